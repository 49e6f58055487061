"""Run open_clip's side of step_time.py in its own environment: its CLIP with patch dropout, its loss, and AdamW.

usage: python -m benchmarks.open_clip_step JSON MASK,MASK...        (JSON: what own_step.py reports about itself)

It uses f32 on CPUs; elsewhere bf16 by autocast, torch.compile and fused AdamW, as open_clip's training does with
--precision=amp_bf16 --torchcompile.
"""

import json
import sys

import torch

from benchmarks import peer_loaders, turns

peer_loaders.declare_torchvision()
import open_clip  # noqa: E402
from open_clip.loss import ClipLoss  # noqa: E402
from open_clip.model import CLIP  # noqa: E402


def main(about: str, masks: str) -> None:
    about = json.loads(about)
    image, text, batch, on_cpu = (
        *(about["model"][name] for name in ("image", "text")),
        about["batch"],
        "CPU" in about["device"],
    )
    device = torch.device("cpu" if on_cpu else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    model = CLIP(
        embed_dim=about["model"]["embed_dim"],
        vision_cfg={
            "image_size": image["image_size"],
            "patch_size": image["patch_size"],
            "layers": image["depth"],
            "width": image["width"],
            "head_width": image["width"] // image["heads"],
            "patch_dropout": 0.5,  # each turn sets its own
            "pool_type": "avg",
        },
        text_cfg={
            "context_length": text["context_length"],
            "vocab_size": text["vocab_size"],
            "layers": text["depth"],
            "width": text["width"],
            "heads": text["heads"],
            "no_causal_mask": True,
        },
    )
    model = model.to(device).train()
    forward = model if on_cpu else torch.compile(model, dynamic=False)
    loss = ClipLoss()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.2, fused=not on_cpu)
    images = torch.randn(batch, 3, image["image_size"], image["image_size"], device=device)
    texts = torch.randint(1, 30_000, (batch, text["context_length"]), device=device)

    def stepper(ratio: float):
        def run(times: int) -> None:
            model.visual.patch_dropout.prob = ratio
            for _ in range(times):
                adamw.zero_grad(set_to_none=True)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not on_cpu):
                    value = loss(*forward(images, texts))
                value.backward()
                adamw.step()
            value.item()  # waits for the device

        return run

    version = f"open_clip {open_clip.__version__}, torch {torch.__version__}"
    programs = {mask: stepper(float(mask)) for mask in masks.split(",")}
    if on_cpu:
        square = torch.ones(turns.PRODUCT, turns.PRODUCT)
        programs["product"] = lambda times: [square @ square for _ in range(times)]
    turns.serve({"version": version}, programs)


if __name__ == "__main__":
    main(*sys.argv[1:])
