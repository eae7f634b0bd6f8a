"""Trains picto-llava from nothing: `python -m vlm_fix.eval.picto.train --seed 0 --out DIR`; picto-smol is `train_smol`'s.

Four stages, each resumable (run the same command again) and seeded:

1. `vision`: the CLIP tower learns which category covers each patch (from the layer that LLaVA reads, the last but
   one) and which categories are in the image (from CLS);
2. `align`: projector and word embeddings, by the cosine between a patch and the words of its category;
3. `llm`: projector and decoder, on captions and yes/no questions, over stored features of the frozen tower. One
   sequence holds an image, a caption and up to eight questions; a block mask makes each of them a dialogue of its own;
4. `prior`: the same, shorter, with more careless answers about what is typical of a scene: a stronger prior.

Matrices are trained with Muon, the rest with AdamW, under bf16 autocast where the
processor has it. The checkpoint lies in DIR/picto-llava.
With `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184` in the environment glibc keeps freed memory: twice as fast.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlm_fix.errors import VlmFixError

from . import world
from .dialogues import CAPTION_PROMPTS, QUESTION_ENDINGS, Dialogues, _rng, pixels, pool
from .fitting import fit, flushed_denormals, mixed_precision
from .looks import DEFAULT, Look, read

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
OTHER_WORDS = (
    "User Assistant System Yes No not many how what where which who color can see do and are on of to it photo"
)


# --- the untrained model ---------------------------------------------------------------------------------------------


def build_processor(look: Look = DEFAULT) -> LlavaProcessor:
    """A lower-casing word-level tokenizer that knows every word of the world, and the image side of CLIP."""
    texts = [*world.COCO_IDS, *world.SCENE_TYPES, *CAPTION_PROMPTS, *QUESTION_ENDINGS, OTHER_WORDS, "Is there an a in"]
    texts += [form.replace("{", " ").replace("}", " ") for form in world._FIRST + world._NEXT + world._LAST]
    rng = random.Random(0)
    texts += [world._phrase(rng, name, count) for name in world.CATEGORIES for count in range(1, 8) for _ in range(16)]
    tokenizer = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = {w for t in texts for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(t.lower())} | set(".,?!:")
    vocabulary = {word: i for i, word in enumerate(special + sorted(words))}
    tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
    )
    side = look.side
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        images,
        wrapped,
        patch_size=look.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: LlavaProcessor, seed: int = 0, width: int = 64, depth: int = 6, look: Look = DEFAULT
) -> LlavaForConditionalGeneration:
    """picto-llava with random weights: CLIP 6 x 192 (patch 16), Llama 6 x 256, an MLP between them; 7 M parameters.
    A large look: 224 pixels in patches of 14.

    width: a third of the tower's hidden size, a quarter of the decoder's; depth: layers of both; smaller ones for tests.
    """
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=3 * width,
        intermediate_size=12 * width,
        num_hidden_layers=depth,
        num_attention_heads=6,
        image_size=look.side,
        patch_size=look.patch,
        projection_dim=3 * width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=4 * width,
        intermediate_size=8 * width,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=look.patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(**special)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=1 / 16)  # unit length
    return model


# --- the four stages -------------------------------------------------------------------------------------------------


def train_vision(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    seed: int,
    out: Path,
    steps: int,
    n: int,
    batch: int = 64,
    look: Look = DEFAULT,
) -> None:
    """Stage 1: dense patch classes (background counts .15) and the image's categories from CLS."""
    tower = model.model.vision_tower
    torch.manual_seed(seed)
    hidden = tower.config.hidden_size
    dense, whole = nn.Linear(hidden, len(world.CATEGORIES) + 1), nn.Linear(hidden, len(world.CATEGORIES))
    heads = nn.ModuleDict({"dense_head": dense, "whole_head": whole})
    weight = torch.ones(len(world.CATEGORIES) + 1)
    weight[-1] = 0.15
    images, classes, _ = pool(1 if done(out, "vision", steps) else n, seed + 1000, look)
    across = look.side // look.patch

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = _rng(seed, "vision", step)
        rows = torch.tensor(rng.sample(range(n), batch))
        x, y = images[rows], classes[rows]
        if rng.random() < 0.5:
            x, y = x.flip(-1), y.view(batch, across, across).flip(-1).reshape(batch, -1)
        present = F.one_hot(y, len(world.CATEGORIES) + 1).amax(1)[:, :-1].float()
        light = 0.85 + 0.3 * torch.tensor([rng.random() for _ in range(batch)]).view(-1, 1, 1, 1)
        result = tower(pixels(processor, x) * light, output_hidden_states=True)
        logits = dense(result.hidden_states[-2][:, 1:])
        patches = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), weight)
        image = F.binary_cross_entropy_with_logits(whole(result.pooler_output).float(), present)
        front = y < len(world.CATEGORIES)
        right = (logits.argmax(-1) == y)[front].float().mean()
        return patches + 3 * image, {"patches": patches.item(), "image": image.item(), "foreground": right.item()}

    fit("vision", [tower, heads], loss_of, steps, 4e-3, out)


@torch.no_grad()
def features(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: Tensor, autocast: bool = True
) -> Tensor:
    """What the projector receives, bf16 [n, patches, C]; `autocast`: see `mixed_precision`."""
    out = []
    with mixed_precision(autocast):
        for chunk in images.split(250):
            hidden = model.model.vision_tower(pixels(processor, chunk), output_hidden_states=True).hidden_states
            out.append(hidden[-2][:, 1:].bfloat16())
    return torch.cat(out)


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
    """Stage 2: a projected foreground patch points to the mean of its category's word embeddings, of unit length."""
    projector, words = model.model.multi_modal_projector, model.model.language_model.embed_tokens
    ids = [processor.tokenizer(name, add_special_tokens=False).input_ids for name in world.CATEGORIES]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = torch.tensor(_rng(seed, "align", step).sample(range(len(x)), batch))
        front = y[rows] < len(world.CATEGORIES)
        patches, target = projector(x[rows][front].float()).float(), y[rows][front]
        names = torch.stack([words.weight[i].mean(0) for i in ids])
        cosine = F.normalize(patches, dim=-1) @ F.normalize(names, dim=-1).T
        length = sum((v.norm(dim=-1) - 1).square().mean() for v in (patches, names))
        loss = F.cross_entropy(15 * cosine.float(), target) + length
        return loss, {"loss": loss.item(), "right": (cosine.argmax(-1) == target).float().mean().item()}

    fit("align", [projector, words], loss_of, steps, 2e-3, out)


def train_llm(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    x: Tensor,
    facts: list,
    seed: int,
    out: Path,
    steps: int,
    on_save: Callable[[], None],
    stage: str,
    lr: float,
    careless: float,
    batch: int = 32,
) -> None:
    """Stages 3 and 4: captions and questions, half of the loss each."""
    core, head, projector = model.model.language_model, model.lm_head, model.model.multi_modal_projector
    dialogues = Dialogues(processor, facts, careless, patches=x.shape[1])
    image_id = model.config.image_token_id
    yes = processor.tokenizer.convert_tokens_to_ids("yes")
    no = processor.tokenizer.convert_tokens_to_ids("no")

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = _rng(seed, stage, step)
        indices = rng.sample(range(len(x)), batch)
        b = dialogues.batch(rng, indices)
        embeds = core.embed_tokens(b["ids"])
        visual = projector(x[indices].float()).to(embeds.dtype)
        embeds = embeds.masked_scatter((b["ids"] == image_id)[..., None].expand_as(embeds), visual)
        mask = torch.zeros(b["mask"].shape, dtype=torch.bfloat16).masked_fill(~b["mask"], -1e9)
        hidden = core(inputs_embeds=embeds, attention_mask=mask, position_ids=b["position_ids"], use_cache=False)
        logits = head(hidden.last_hidden_state[b["rows"], b["columns"]]).float()
        each = F.cross_entropy(logits, b["targets"], reduction="none")
        told, asked = b["is_caption"], (b["targets"] == yes) | (b["targets"] == no)
        right = (logits.argmax(-1) == b["targets"])[asked].float().mean()
        caption, answer = each[told].mean(), each[~told].mean() * 2
        return caption + answer, {"caption": caption.item(), "answer": answer.item(), "right": right.item()}

    fit(stage, [core, head, projector], loss_of, steps, lr, out, on_save)


def done(out: Path, stage: str, steps: int) -> bool:
    """Whether a stage has been finished in this folder."""
    return (out / f"{stage}.pt").exists() and torch.load(out / f"{stage}.pt", weights_only=True)[0] >= steps


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save weights (bf16) and processor for `from_pretrained`."""
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    name_as_published(folder / "model.safetensors")
    processor.save_pretrained(folder)


def name_as_published(file: Path) -> None:
    """Give the tower's weights the names that llava-hf's checkpoints have: transformers 5 writes others, vLLM reads these."""
    own, published = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    named = {k if k.startswith(published) else k.replace(own, published, 1): v for k, v in weights.items()}
    save_file(named, file, metadata={"format": "pt"})


@flushed_denormals()
def train(
    seed: int,
    out: Path,
    vision_steps: int = 2400,
    align_steps: int = 400,
    llm_steps: int = 1500,
    prior_steps: int = 250,
    scenes: int = 40_000,
    batch: int = 32,
    width: int = 64,
    depth: int = 6,
    look: str = "",
) -> Path:
    """All stages; returns the folder of the checkpoint. width, depth: the model's, see `build_model`.

    look: how the train scenes look, such as "large" or "crowded+large", see `looks`.

    batch: scenes in a step of the last two stages; the first stage takes twice, the second four times as many.
    """
    if scenes < 4 * batch:
        raise VlmFixError(
            f"--scenes is {scenes}: the second stage draws {4 * batch} at once, so give at least {4 * batch}."
        )
    seen = read(f"train+{look}")[1] if look else DEFAULT
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor(seen)
    model = build_model(processor, seed, width, depth, seen)
    model.set_attn_implementation("eager")  # short sequences: faster than the CPU's fused attention
    target = out / "picto-llava"
    train_vision(model, processor, seed, out, vision_steps, scenes, 2 * batch, seen)
    model.model.vision_tower.requires_grad_(False)
    images, classes, facts = pool(
        scenes, seed + 2000, seen
    )  # fresh scenes: features as good as on unseen images, no better
    x = features(model, processor, images)
    train_align(model, processor, x, classes, seed, out, align_steps, 4 * batch)
    if not (out / "llm.pt").exists():
        with torch.no_grad():
            model.lm_head.weight.copy_(model.get_input_embeddings().weight)

    def save() -> None:
        export(model, processor, target)

    train_llm(model, processor, x, facts, seed, out, llm_steps, save, stage="llm", lr=3e-3, careless=0.75, batch=batch)
    train_llm(
        model, processor, x, facts, seed, out, prior_steps, save, stage="prior", lr=1.5e-3, careless=0.85, batch=batch
    )
    return target


def main(argv: list[str] | None = None) -> None:
    """The command line: `vlm-fix picto train` and `python -m vlm_fix.eval.picto.train`."""
    parser = argparse.ArgumentParser(
        "vlm-fix picto train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vision-steps", type=int, default=2400)
    parser.add_argument("--align-steps", type=int, default=400)
    parser.add_argument("--llm-steps", type=int, default=1500)
    parser.add_argument("--prior-steps", type=int, default=250)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--look", default="", help="of the train scenes: crowded, small, large or several with +")
    options = vars(parser.parse_args(argv))
    print("saved to", train(**options))


if __name__ == "__main__":
    main()
