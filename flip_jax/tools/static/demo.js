"use strict";

const $ = (id) => document.getElementById(id);
let about, seed = 0, working = 0;
let picture = null; // what forms carry: {picture: File} or {key: a picture of the folder}

function complain(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// The server's answer to a form. What it refuses is said at the top of the page, and the answer is then null.
async function ask(path, fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  document.body.classList.toggle("busy", ++working > 0);
  try {
    const response = await fetch(path, { method: "POST", body: form });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  } catch (error) {
    complain(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
    return null;
  } finally {
    document.body.classList.toggle("busy", --working > 0);
  }
}

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  element.textContent = text;
  element.append(...children);
  return element;
}

async function classify() {
  const scores = await ask("/classify", { ...picture, names: $("names").value, template: $("template").value });
  $("scores").replaceChildren(
    ...(scores || []).slice(0, 100).map(({ name, share, cosine }) => {
      const bar = make("progress", "");
      bar.value = share;
      const figures = make("small", `${(100 * share).toFixed(1)} %  ·  cosine ${cosine.toFixed(3)}`);
      return make("li", "", make("div", "", make("span", name), figures), bar);
    }),
  );
}

async function mask() {
  const fields = { strategy: $("strategy").value, ratio: $("ratio").value, seed };
  const answer = await ask("/mask", { ...picture, ...fields });
  $("kept").hidden = !answer;
  if (answer) {
    $("kept").src = answer.kept;
    $("kept").style.width = `${100 * answer.width}%`;
    $("whole").src = answer.whole;
    $("whole").hidden = !($("hint").hidden = true);
    $("drop").classList.add("full");
    for (const id of ["whole", "kept"]) $(id).style.imageRendering = about.image_size < 160 ? "pixelated" : "auto";
  }
  $("counts").textContent = answer ? `${answer.visible} of ${answer.patches} patches stay` : "";
  return answer;
}

function describe() {
  $("shown").textContent = Number($("ratio").value).toFixed(2);
  $("meaning").textContent = about.strategies[$("strategy").value];
}

async function use(chosen) {
  complain("");
  if (chosen.picture && chosen.picture.size > about.max_upload - 2 ** 16) {
    const size = (chosen.picture.size / 2 ** 20).toFixed(0);
    return complain(`${chosen.picture.name} has ${size} MiB, more than the ${about.max_upload / 2 ** 20} MiB allowed.`);
  }
  const before = picture;
  picture = chosen;
  if (await mask()) await classify();
  else picture = before;
}

async function search() {
  const hits = await ask("/search", { text: $("text").value });
  $("hits").replaceChildren(
    ...(hits || []).map((hit) => {
      const image = make(hit.picture ? "img" : "span", hit.error || "");
      if (hit.picture) image.src = hit.picture;
      else image.className = "none";
      const button = make("button", "", image, make("small", "", make("b", hit.score.toFixed(3)), ` ${hit.key}`));
      button.title = hit.key;
      button.addEventListener("click", () => use({ key: hit.key }));
      return button;
    }),
  );
}

function submits(id, action) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    complain("");
    action();
  });
}

async function start() {
  about = await (await fetch("/about")).json();
  const side = about.image_size / about.patch_size;
  $("about").textContent =
    `${about.model} · ${(about.parameters / 1e6).toFixed(1)} M parameters · pictures of ${about.image_size} px in ` +
    `${side} × ${side} patches`;
  $("template").value = about.template;
  $("strategy").append(...Object.keys(about.strategies).map((name) => make("option", name)));
  $("strategy").value = about.mask;
  $("ratio").value = about.mask_ratio;
  describe();
  $("searching").hidden = !about.pictures;
  const bad = Object.entries(about.left_out).map(([kind, count]) => `${count} left out: ${kind}`);
  $("searched").textContent = [`${about.pictures.toLocaleString("en")} pictures`, ...bad].join(" · ");

  submits("classes", () => (picture ? classify() : complain("Drop a picture first.")));
  submits("masking", () => (picture ? (seed++, mask()) : complain("Drop a picture first.")));
  submits("search", search);
  const changed = () => {
    describe();
    complain("");
    if (picture) mask();
  };
  $("ratio").addEventListener("change", changed);
  $("strategy").addEventListener("change", changed);
  $("ratio").addEventListener("input", describe);
  $("file").addEventListener("change", () => $("file").files[0] && use({ picture: $("file").files[0] }));
  for (const type of ["dragover", "dragleave", "drop"]) {
    // Anywhere on the page: a browser would open what is dropped beside.
    document.addEventListener(type, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", type === "dragover");
    });
  }
  document.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) use({ picture: file });
  });
  document.body.dataset.ready = "yes";
}

start();
