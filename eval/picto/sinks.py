"""How strong a model's sinks are in the Picto world, and how often VAR's gate opens there.

`python -m vlm_fix.eval.picto.sinks [--model picto-smol] [--scenes 20]` prints the tables of a model card: `observe` on the
caption prompt of the first `test` scenes, the last prompt row, float32.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_fix.eval.prompts import encode
from vlm_fix.observation.observe import Observation, observe

from . import model_path, world
from .dialogues import CAPTION_PROMPTS


def opened(seen: Observation, rho: float = 0.5, least: float = 0.2) -> torch.Tensor:
    """[layers - 2, heads] bool: where VAR would move attention on the last prompt row, from layer 2 on."""
    sinks = seen.image_sinks[2:, None]  # [L, 1, N]
    weights = seen.weights_to_image[2:, :, 0]  # [L, H, N]
    image, sunk = weights.sum(-1), (weights * sinks).sum(-1)
    return sinks.any(-1) & (image >= least) & ((image - sunk) / image >= rho) & (image > sunk)


def row(name: str, values: torch.Tensor, layers: list[int], digits: int) -> str:
    return " | ".join([f"| {name}", *(f"{values[i]:.{digits}f}".lstrip("0") or "0" for i in layers)]) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m vlm_fix.eval.picto.sinks", description=__doc__)
    parser.add_argument("--model", default="picto-smol")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--split", default="test", choices=world.SPLITS)
    parser.add_argument("--dims", type=int, nargs="+", help="dimensions for the last lines; without: those of BOS")
    options = parser.parse_args(argv)
    name = options.model
    path = model_path(name) if name.startswith("picto-") and not Path(name).exists() else name
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    prompts = [
        dict(encode(model, processor, [world.scene(options.split, 0, i).image], [CAPTION_PROMPTS[0]]))
        for i in range(options.scenes)
    ]
    depth, image = model.config.get_text_config().num_hidden_layers, model.config.image_token_id
    layers = sorted({*range(0, depth, 3), 1, 2, depth - 2, depth - 1})
    seen, first, strongest, where = [], [], [], Counter[int]()
    massive: torch.Tensor | int = 0
    for prompt in track(prompts, "scenes", console=Console(stderr=True)):
        with torch.no_grad():
            inputs = torch.stack(model(**prompt, output_hidden_states=True).hidden_states[:-1])[:, 0]  # [L, n, C]
        ratio = inputs.abs() / inputs.square().mean(dim=-1, keepdim=True).sqrt()
        on_image = ratio[:, prompt["input_ids"][0] == image].amax(dim=1)  # [L, C]
        first.append(ratio[:, 0].amax(dim=-1))
        strongest.append(on_image.amax(dim=-1))
        where.update(on_image.argmax(dim=-1).tolist())
        massive = massive + (ratio[:, 0] > 20).sum(dim=0)
        seen.append(observe(model, prompt))
    dims = options.dims or [int(d) for d in (massive >= depth * len(seen) / 2).nonzero()[:, 0]]
    print(f"{name}: {options.scenes} scenes of {options.split}; phi is at most {inputs.shape[-1] ** 0.5:.1f}\n")
    print(f"| layer | {' | '.join(map(str, layers))} |\n|---{'|---' * len(layers)}|")
    print(row("phi of the first token", torch.stack(first).mean(dim=0), layers, 1))
    print(row("largest phi of an image token, mean", torch.stack(strongest).mean(dim=0), layers, 1))
    for label, masses in (
        ("attention on the text before the image", [s.system_mass for s in seen]),
        ("... on the image tokens", [s.visual_mass for s in seen]),
    ):
        print(row(label, torch.stack([m[:, :, 0].mean(dim=1) for m in masses]).mean(dim=0), layers, 2))
    print(f"\ndimensions of the first token above 20 in half of the layers: {dims or 'none'}")
    print(f"dimension of the strongest image token, of {depth * len(seen)} layers and scenes: {where.most_common(4)}")
    heads = depth * seen[0].visual_mass.shape[1]
    for tau in (20, 15, 10):
        for label, chosen in (("all dimensions", None), (f"dimensions {dims}", dims)):
            if chosen == []:
                continue
            found = [observe(model, prompt, tau=tau, sink_dims=chosen) for prompt in prompts]
            gates = torch.tensor([int(opened(s).sum()) for s in found])
            sinks = sum(bool(s.image_sinks[2:].any()) for s in found)
            print(
                f"tau {tau}, {label}: an image sink in {sinks} of {len(found)} scenes; VAR's gate opens in "
                f"{int((gates > 0).sum())}, in {gates.float().mean():.1f} of {heads} heads on average"
            )


if __name__ == "__main__":
    main()
