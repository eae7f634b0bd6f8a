"""Trains picto-smol: `vlm-fix picto train --language smol --seed 0 --out DIR`.

picto-llava's tower and SmolLM2-135M-Instruct stay frozen; two stages, each resumable (run the same command again) and
seeded; the second in mixed precision where the processor multiplies bfloat16 itself, else in float32:

1. `align`: the projector, by the cosine between a projected patch and the mean embedding of " name" of its category;
2. `language`: projector and LoRA (q, k, v, o of every layer) on captions and yes/no questions. One sequence holds an
   image, a caption and up to eight questions; a block mask makes each of them a dialogue of its own. In the last steps
   more of the questions are about what is typical of a scene (with careless answers): a stronger prior.

The parts for the package lie in DIR/picto-smol (see `smol.assemble`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlm_fix.errors import VlmFixError

from . import lora, smol, world
from .dialogues import Chat, Dialogues, _rng, pool
from .fitting import fit, flushed_denormals
from .looks import DEFAULT, Look, read
from .train import features

RANK = 16
CARELESS = 0.9  # chance of a 'yes' about the most typical absent object; the checkpoint that is kept had it
TYPICAL = (0.35, 0.6)  # the share of typical objects among the absent ones asked about: at first, in the last steps
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
SMOL_CHAT = Chat("<|im_start|>user\n", "\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
CHAT_TEMPLATE = (  # SmolLM2's own, with images and without the sentence about its name
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- the untrained model ---------------------------------------------------------------------------------------------


def build_processor(file: Path, look: Look = DEFAULT) -> LlavaProcessor:
    """The GGUF file's tokenizer with <image> (id 49152), and the image side of picto-llava."""
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    digits = pre_tokenizers.Digits(individual_digits=True)  # "smollm" in the file, which transformers does not read
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side, tokenizer.model_max_length = "left", 8192
    side = look.side
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        patch_size=look.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_config(processor: LlavaProcessor, vision: dict, weights: dict[str, Tensor]) -> LlavaConfig:
    """LLaVA's configuration around a Llama of the size of `weights` (SmolLM2's heads) and the tower of picto-llava."""
    words, width = weights["embed_tokens.weight"].shape
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=words + 1,
        hidden_size=width,
        intermediate_size=len(weights["layers.0.mlp.up_proj.weight"]),
        num_hidden_layers=smol.LAYERS,
        num_attention_heads=smol.HEADS,
        num_key_value_heads=smol.KEY_HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        **special,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **special,
    )


def build_model(
    seed: int, file: Path | None = None, eye: Path | None = None, look: Look = DEFAULT
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, lora.Adapters]:
    """picto-smol before training, float32: the projector is random, the adapters (scale B A) are zero.

    eye: the checkpoint whose tower it takes, None: picto-llava's. VlmFixError if the tower is not for scenes of this look.
    """
    from . import model_path

    file = smol.check(smol.find(file))
    weights = smol.read_gguf(file)
    processor = build_processor(file, look)
    donor = AutoModelForImageTextToText.from_pretrained(eye or model_path("picto-llava"), dtype=torch.float32)
    vision = donor.config.vision_config
    if (vision.image_size, vision.patch_size) != (look.side, look.patch):
        raise VlmFixError(
            f"The tower is for {vision.image_size}-pixel images in patches of {vision.patch_size}, and these scenes have "
            f"{look.side} pixels: train one with `vlm-fix picto train --look large` and give its folder as --eye."
        )
    config = build_config(processor, vision.to_dict(), weights)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    model.model.vision_tower = donor.model.vision_tower
    model.model.language_model.load_state_dict(smol.with_image_token(weights))
    model.requires_grad_(False)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    adapters = lora.attach(model.model.language_model, ADAPTED, RANK, smol.SCALE)
    model.model.multi_modal_projector.requires_grad_(True)
    return model.eval(), processor, adapters


# --- the two stages --------------------------------------------------------------------------------------------------


def train_align(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    x: Tensor,
    y: Tensor,
    seed: int,
    out: Path,
    steps: int,
    batch: int = 128,
) -> None:
    """Stage 1. x [n, 64, 192]: what the projector receives; y int64 [n, 64]: patch classes."""
    projector, words = model.model.multi_modal_projector, model.get_input_embeddings().weight
    assert isinstance(words, Tensor)
    ids = [processor.tokenizer(f" {name}", add_special_tokens=False).input_ids for name in world.CATEGORIES]
    names = torch.stack([words[i].mean(0) for i in ids])
    length = names.norm(dim=-1).mean()

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = torch.tensor(_rng(seed, "smol align", step).sample(range(len(x)), min(batch, len(x))))
        front = y[rows] < len(world.CATEGORIES)
        patches, target = projector(x[rows][front].float()), y[rows][front]
        cosine = F.normalize(patches, dim=-1) @ F.normalize(names, dim=-1).T
        loss = F.cross_entropy(15 * cosine, target) + (patches.norm(dim=-1) / length - 1).square().mean()
        return loss, {"loss": loss.item(), "right": (cosine.argmax(-1) == target).float().mean().item()}

    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    fit("align", [projector], loss_of, steps, 2e-3, out, optimizers=[optimizer], autocast=False)


def train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    adapters: lora.Adapters,
    x: Tensor,
    facts: list,
    seed: int,
    out: Path,
    steps: int,
    prior_steps: int,
    careless: float,
    batch: int = 4,
) -> None:
    """Stage 2: captions and questions, half of the loss each; x [n, 64, 192] and facts of the same scenes.

    After `steps`, `prior_steps` follow in which more of the absent objects are typical of the scene (`TYPICAL`).
    """
    core, head, projector = model.model.language_model, model.lm_head, model.model.multi_modal_projector
    early, late = (Dialogues(processor, facts, careless, SMOL_CHAT, typical, x.shape[1]) for typical in TYPICAL)
    image_id = model.config.image_token_id
    yes, no = processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = _rng(seed, "smol language", step)
        indices = rng.sample(range(len(x)), batch)
        b = (early if step < steps else late).batch(rng, indices)
        embeds = core.embed_tokens(b["ids"])
        visual = projector(x[indices].float())
        embeds = embeds.masked_scatter((b["ids"] == image_id)[..., None].expand_as(embeds), visual.to(embeds.dtype))
        mask = torch.zeros(b["mask"].shape).masked_fill(~b["mask"], -1e9)
        hidden = core(inputs_embeds=embeds, attention_mask=mask, position_ids=b["position_ids"], use_cache=False)
        logits = head(hidden.last_hidden_state[b["rows"], b["columns"]]).float()
        each = F.cross_entropy(logits, b["targets"], reduction="none")
        told, asked = b["is_caption"], ~b["is_caption"] & ((b["targets"] == yes) | (b["targets"] == no))
        right = (logits.argmax(-1) == b["targets"])[asked].float().mean()
        caption, answer = each[told].mean(), each[~told].mean() * 2
        return caption + answer, {"caption": caption.item(), "answer": answer.item(), "right": right.item()}

    groups = [{"params": projector.parameters(), "lr": 5e-4}, {"params": adapters.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    def save() -> None:
        export(model, processor, adapters, out / "picto-smol")

    parts: list[nn.Module] = [projector, adapters]
    fit(
        "language",
        parts,
        loss_of,
        steps + prior_steps,
        1e-3,
        out,
        save,
        optimizers=[optimizer],
        show=10,
    )


def export(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, adapters: lora.Adapters, folder: Path
) -> None:
    """The parts that `smol.assemble` takes: tower, projector and LoRA in bfloat16, configuration, processor."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"], "dtype": "bfloat16"}
    LlavaConfig.from_dict(config).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    words = folder / "tokenizer.json"
    words.write_text(json.dumps(json.loads(words.read_text()), ensure_ascii=False, separators=(",", ":")))
    state = {f"vision_tower.{k}": v for k, v in model.model.vision_tower.state_dict().items()}
    state |= {f"multi_modal_projector.{k}": v for k, v in model.model.multi_modal_projector.state_dict().items()}
    state |= {f"lora.{k}": v for k, v in adapters.tensors().items()}
    draft = folder / f".{smol.ADAPTER}"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}, draft, metadata={"format": "pt"})
    draft.replace(folder / smol.ADAPTER)


def train(
    seed: int,
    out: Path,
    align_steps: int = 300,
    language_steps: int = 240,
    prior_steps: int = 160,
    scenes: int = 3000,
    careless: float = CARELESS,
    file: Path | None = None,
    eye: Path | None = None,
    look: str = "",
) -> Path:
    """Both stages; returns the folder of the parts. `file`: the language weights, else as `smol.find` says.

    `eye` and `look`: the checkpoint that the tower is from, and how the train scenes look (see `build_model`, `looks`).
    """
    if scenes < 4:
        raise VlmFixError(f"--scenes is {scenes}: the second stage draws batches of 4, so give at least 4.")
    seen = read(f"train+{look}")[1] if look else DEFAULT
    out.mkdir(parents=True, exist_ok=True)
    with flushed_denormals():
        model, processor, adapters = build_model(seed, file, eye, seen)
        images, classes, facts = pool(scenes, seed + 3000, seen)
        x = features(model, processor, images, autocast=False)
        del images
        train_align(model, processor, x, classes, seed, out, align_steps)
        train_language(model, processor, adapters, x, facts, seed, out, language_steps, prior_steps, careless)
    return out / "picto-smol"


def main(argv: list[str] | None = None) -> None:
    """The command line behind `vlm-fix picto train --language smol`."""
    parser = argparse.ArgumentParser(
        "vlm-fix picto train --language smol",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--align-steps", type=int, default=300)
    parser.add_argument("--language-steps", type=int, default=240)
    parser.add_argument("--prior-steps", type=int, default=160, help="the last steps of the second stage (%(default)s)")
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument(
        "--careless", type=float, default=CARELESS, help="chance of a 'yes' from the prior (%(default)s)"
    )
    parser.add_argument("--eye", type=Path, help="checkpoint whose tower it takes (picto-llava)")
    parser.add_argument("--look", default="", help="of the train scenes: crowded, small, large or several with +")
    parser.add_argument("--file", type=Path, help=f"{smol.FILE}, if it is not installed")
    print("saved to", train(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
