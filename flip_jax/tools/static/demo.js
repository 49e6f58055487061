"use strict";

const $ = (id) => document.getElementById(id);
let about, seed = 0, working = 0;
let image = null; // the image in forms: {image: File} or {key: an image of the folder}

function complain(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// Return the server's answer to a form, or null after showing its refusal at the top of the page.
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
  const scores = await ask("/classify", { ...image, names: $("names").value, template: $("template").value });
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
  const answer = await ask("/mask", { ...image, ...fields });
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
  if (chosen.image && chosen.image.size > about.max_upload - 2 ** 16) {
    const size = (chosen.image.size / 2 ** 20).toFixed(0);
    return complain(`${chosen.image.name} has ${size} MiB, more than the ${about.max_upload / 2 ** 20} MiB allowed.`);
  }
  const before = image;
  image = chosen;
  if (await mask()) await classify();
  else image = before;
}

async function search() {
  const hits = await ask("/search", { text: $("text").value });
  $("hits").replaceChildren(
    ...(hits || []).map((hit) => {
      const thumbnail = make(hit.image ? "img" : "span", hit.error || "");
      if (hit.image) thumbnail.src = hit.image;
      else thumbnail.className = "none";
      const button = make("button", "", thumbnail, make("small", "", make("b", hit.score.toFixed(3)), ` ${hit.key}`));
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
    `${about.model} · ${(about.parameters / 1e6).toFixed(1)} M parameters · images of ${about.image_size} px in ` +
    `${side} × ${side} patches`;
  $("template").value = about.template;
  $("strategy").append(...Object.keys(about.strategies).map((name) => make("option", name)));
  $("strategy").value = about.mask;
  $("ratio").value = about.mask_ratio;
  describe();
  $("searching").hidden = !about.images;
  const bad = Object.entries(about.skipped).map(([kind, count]) => `${count} skipped: ${kind}`);
  $("searched").textContent = [`${about.images.toLocaleString("en")} images`, ...bad].join(" · ");

  submits("classes", () => (image ? classify() : complain("Drop an image first.")));
  submits("masking", () => (image ? (seed++, mask()) : complain("Drop an image first.")));
  submits("search", search);
  const changed = () => {
    describe();
    complain("");
    if (image) mask();
  };
  $("ratio").addEventListener("change", changed);
  $("strategy").addEventListener("change", changed);
  $("ratio").addEventListener("input", describe);
  $("file").addEventListener("change", () => $("file").files[0] && use({ image: $("file").files[0] }));
  for (const type of ["dragover", "dragleave", "drop"]) {
    // On the whole document, because a browser opens a file that is dropped next to the box.
    document.addEventListener(type, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", type === "dragover");
    });
  }
  document.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) use({ image: file });
  });
  document.body.dataset.ready = "yes";
}

start();
