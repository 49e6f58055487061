"""Record tiny CLIP and SigLIP models of transformers with random weights, inputs and outputs, for tests/formats.

Needs transformers and torch, which the tests do not: python dev/record_transformers.py

Two architectures each. clip_largest: OpenAI's first configurations, whose eos_token_id 2 means the largest id, and
quick_gelu. clip_eos: pooled at the eos id, which also pads; other sizes, an MLP that is not 4 times as wide, GELU.
siglip: a Unigram tokenizer like T5's, padded with its </s>. siglip2: byte pairs like Gemma's, and so400m's odd MLP.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

FIXTURES = pathlib.Path(__file__).parent.parent / "tests" / "fixtures"
OUT = FIXTURES / "transformers"
TEXTS = ["the sting", "", "A photo of THE cat, and the other one.", "over and over " * 8]
STATS = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5] * 3, [0.5] * 3),
}
MODELS = {
    "clip_largest": (
        {"projection_dim": 24},
        {"hidden_size": 32, "intermediate_size": 128, "image_size": 32, "patch_size": 8, "num_attention_heads": 4},
        {"hidden_size": 16, "intermediate_size": 64, "max_position_embeddings": 12, "num_attention_heads": 2}
        | {"vocab_size": 914, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
    ),
    "clip_eos": (
        {"projection_dim": 16},
        {"hidden_size": 32, "intermediate_size": 64, "image_size": 24, "patch_size": 8, "num_attention_heads": 2}
        | {"num_hidden_layers": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
        {"hidden_size": 16, "intermediate_size": 48, "max_position_embeddings": 10, "num_attention_heads": 4}
        | {"vocab_size": 914, "eos_token_id": 913, "bos_token_id": 912, "pad_token_id": 913}
        | {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    ),
    "siglip": (
        {},
        {"hidden_size": 32, "intermediate_size": 128, "image_size": 32, "patch_size": 8, "num_attention_heads": 4},
        {"hidden_size": 16, "intermediate_size": 64, "max_position_embeddings": 16, "num_attention_heads": 2}
        | {"projection_size": 32, "vocab_size": 120, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 1},
    ),
    "siglip2": (
        {},
        {"hidden_size": 24, "intermediate_size": 90, "image_size": 28, "patch_size": 14, "num_attention_heads": 2}
        | {"num_hidden_layers": 3},
        {"hidden_size": 24, "intermediate_size": 90, "max_position_embeddings": 12, "num_attention_heads": 4}
        | {"projection_size": 24, "vocab_size": 300, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0},
    ),
}


def clip_tokenizer():
    """CLIP's byte pairs as its repositories have them, of the head of its merges."""
    merges = [tuple(line.split()) for line in (FIXTURES / "clip_bpe.txt").read_text("utf-8").splitlines()[1:] if line]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(c) for c in (*printable, *range(0x100, 0x100 + 256 - len(printable)))]
    tokens = [*characters, *(f"{c}</w>" for c in characters), *(a + b for a, b in merges)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*tokens, *special])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=special[1]))
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (special[1], len(vocab) - 1), (special[0], len(vocab) - 2), False, False
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def unigram_tokenizer():
    """A Unigram model like T5's: lower case, </s> ends a text and pads it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return tokenizer


def byte_fallback_tokenizer():
    """Byte pairs like Gemma's: blanks become an underline, unknown letters bytes; <eos> ends a text, <pad> fills it."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"thesingoacrvd", "th", "the"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("t", "h"), ("th", "e")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", None, [("<eos>", 1)])
    tokenizer.add_special_tokens(special)
    return tokenizer


TOKENIZERS = {"clip_largest": clip_tokenizer, "clip_eos": clip_tokenizer}
TOKENIZERS |= {"siglip": unigram_tokenizer, "siglip2": byte_fallback_tokenizer}


def record(name):
    """Write the folder of a model as its repository would be, and outputs.npz."""
    kind, folder = name.rstrip("2").partition("_")[0], OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    top, vision, text = MODELS[name]
    vision, text = {"num_hidden_layers": 2} | vision, {"num_hidden_layers": 2} | text
    config_class, model_class = (CLIPConfig, CLIPModel) if kind == "clip" else (SiglipConfig, SiglipModel)
    torch.manual_seed(0)
    model = model_class(config_class(vision_config=vision, text_config=text, **top)).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():  # no array is all zeros or ones
            parameter += 0.05 * torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32))
    model.save_pretrained(folder, safe_serialization=True)

    tokenizer = TOKENIZERS[name]()
    tokenizer.save(str(folder / "tokenizer.json"))
    length, pad = text["max_position_embeddings"], text["pad_token_id"]
    names = {"pad_token": tokenizer.id_to_token(pad)}
    (folder / "tokenizer_config.json").write_text(json.dumps(names) + "\n")
    mean, std = STATS[kind]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}) + "\n")

    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad, pad_token=names["pad_token"])
    ids = np.array([tokenizer.encode(text).ids for text in TEXTS])
    size = vision["image_size"]
    image = rng.integers(0, 256, (4, size, size, 3), np.uint8)
    pixels = ((torch.from_numpy(image) / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(ids), pixel_values=pixels)
    np.savez_compressed(
        folder / "outputs.npz",
        image=image,
        texts=np.array(TEXTS),
        ids=ids.astype(np.int32),
        z_image=found.image_embeds.numpy(),
        z_text=found.text_embeds.numpy(),
        logits=found.logits_per_image.numpy(),
    )


if __name__ == "__main__":
    for name in MODELS:
        record(name)
