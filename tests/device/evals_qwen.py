"""A GGUF model of the qwen2 architecture, brought in parts to a machine without network, and there made what `lowbit eval` takes.

Decides: what travels (the GGUF's own blocks, without a second copy of the embedding; one compressed stream of a folder, cut into
parts with their SHA-256), the plain model that the blocks stand for (bf16, embedding and output tied), and the W4A16 checkpoint
of it. The questions are asked by `lowbit eval`, which goes on where it was killed.
Refuses: other architectures, parts that are missing, of another stream, or damaged: one sentence.

    python tests/device/evals_qwen.py pack MODEL.gguf FOLDER      needs gguf and tokenizers
    python tests/device/evals_qwen.py split FOLDER PARTS          PARTS/00/part, PARTS/01/part, ...
    python tests/device/evals_qwen.py join PARTS FOLDER           once all parts are there
    python tests/device/evals_qwen.py unpack FOLDER MODEL         needs gguf
    python tests/device/evals_qwen.py store MODEL CHECKPOINT      needs lowbit; W4A16 in groups of 128, of compressed-tensors
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

__all__ = ["join", "main", "pack", "split", "store", "unpack"]

MIB = 41
"""Of a part: the 64 MiB of a call less the 21.5 MiB of the repository."""

EPOCH = 1_700_000_000
"""Time stamp of what is written: `lowbit eval` tells models apart by sizes and times, and a run goes on on another machine."""

_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_WHOLE = {"output": "model.embed_tokens", "output_norm": "model.norm"}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the tokenizer of qwen2 cuts a text before it merges bytes."""


class TransportError(ValueError):
    """Parts or files that cannot be used."""


# GGUF to a folder of blocks -------------------------------------------------------------------------------------------


def pack(source: Path, folder: Path) -> None:
    """The blocks of a GGUF file as bytes [rows, bytes], with their GGUF types in the metadata, and config and tokenizer beside
    them. `output` serves as embedding, too, as in the model that the file was made from: `token_embd` is a coarser copy of it."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    if fields["general.architecture"] != "qwen2" or fields["tokenizer.ggml.pre"] != "qwen2":
        raise TransportError(f"{source}: architecture is {fields['general.architecture']!r}; only qwen2 is read here")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    dropped = "token_embd.weight" if "output.weight" in tensors else ""
    names = {name: name.replace("token_embd", "output") for name in tensors if name != dropped}
    folder.mkdir(parents=True)
    blocks = {_name(names[name]): torch.from_numpy(np.array(tensors[name].data).view(np.uint8)) for name in names}
    types = {_name(names[name]): tensors[name].tensor_type.name for name in names}
    save_file(blocks, folder / "blocks.safetensors", metadata=types)
    rows = len(blocks["model.embed_tokens.weight"])
    (folder / "config.json").write_text(json.dumps(_config(fields, rows), indent=1) + "\n", encoding="utf-8")
    _tokenizer(fields, folder)


def _name(of_gguf: str) -> str:
    """Name of a tensor in the checkpoint of the model."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", of_gguf)
    if block:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"
    stem, _, kind = of_gguf.rpartition(".")
    return f"{_WHOLE[stem]}.{kind}"


def _config(fields: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    own = {name.removeprefix("qwen2."): value for name, value in fields.items()}
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": own["embedding_length"], "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"], "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"], "max_position_embeddings": own["context_length"],
        "rms_norm_eps": round(float(own["attention.layer_norm_rms_epsilon"]), 12), "rope_theta": float(own["rope.freq_base"]),
        "vocab_size": vocabulary, "tie_word_embeddings": True,
        "bos_token_id": own["tokenizer.ggml.bos_token_id"], "eos_token_id": own["tokenizer.ggml.eos_token_id"],
    }


def _tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level pairs."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges, fuse_unk=False))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    made.decoder = decoders.ByteLevel()
    for kind, add in ((3, made.add_special_tokens), (4, made.add_tokens)):  # control tokens, and those of a user
        chosen = [token for token, own in zip(tokens, kinds, strict=True) if own == kind]
        add([AddedToken(token, special=kind == 3, normalized=False) for token in chosen])
    made.save(str(folder / "tokenizer.json"))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": fields["qwen2.context_length"],
        "clean_up_tokenization_spaces": False, "bos_token": None, "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


# A folder in parts ----------------------------------------------------------------------------------------------------


class _Cut(io.RawIOBase):
    """Bytes written go to parts of a size, each with its digest."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.digests = folder, size, list[str]()
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._held += data
        while len(self._held) >= self.size:
            self._out(self.size)
        return len(data)

    def finish(self) -> None:
        """The last part, and in each part's folder the digests of all."""
        if self._held:
            self._out(len(self._held))
        text = json.dumps(self.digests)
        for at in range(len(self.digests)):
            (self.folder / f"{at:02}" / "parts.json").write_text(text, encoding="utf-8")

    def _out(self, count: int) -> None:
        place = self.folder / f"{len(self.digests):02}"
        place.mkdir(parents=True)
        piece = bytes(self._held[:count])
        del self._held[:count]
        (place / "part").write_bytes(piece)
        self.digests.append(hashlib.sha256(piece).hexdigest())


def split(folder: Path, parts: Path, mib: int = MIB) -> int:
    """A folder as a compressed stream in parts of `mib` MiB below `parts`, which must not exist. Returns how many."""
    parts.mkdir(parents=True)
    cut = _Cut(parts, mib << 20)
    with tarfile.open(fileobj=cut, mode="w|gz") as stream:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                stream.add(path, str(path.relative_to(folder)))
    cut.finish()
    return len(cut.digests)


def join(parts: Path, folder: Path) -> None:
    """The folder again. Raises TransportError where a part is missing or its bytes are not those that were split."""
    lists = sorted(parts.glob("*/parts.json"))
    if not lists:
        raise TransportError(f"{parts}: no part has arrived; carry PARTS/00 and the others, and copy them there")
    digests: list[str] = json.loads(lists[0].read_text(encoding="utf-8"))
    wrong = [f"{at:02}" for at, digest in enumerate(digests) if _digest(parts / f"{at:02}" / "part") != digest]
    if wrong:
        names = ", ".join(wrong)
        raise TransportError(f"{parts}: {len(wrong)} of {len(digests)} parts are missing or damaged ({names}); carry them")
    with tarfile.open(fileobj=_Joined(parts, len(digests)), mode="r|gz") as stream:
        stream.extractall(folder, filter="data")
    _stamp(folder)


class _Joined(io.RawIOBase):
    """Parts read one after the other."""

    def __init__(self, parts: Path, count: int) -> None:
        self._pieces = (piece for at in range(count) for piece in _pieces(parts / f"{at:02}" / "part"))
        self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._held:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._held = piece
        count = min(len(target), len(self._held))
        target[:count], self._held = self._held[:count], self._held[count:]
        return count


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(lambda: file.read(1 << 16), b"")


def _digest(path: Path) -> str:
    """SHA-256 of a file; of one that is absent the empty text."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (EPOCH, EPOCH))


# Models ---------------------------------------------------------------------------------------------------------------


def _beside(folder: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, target / name)


def unpack(folder: Path, target: Path) -> None:
    """The plain model in bf16: every block as gguf reads it, rounded once."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    _beside(folder, target)
    tensors = {}
    with safe_open(str(folder / "blocks.safetensors"), framework="pt") as file:
        types = file.metadata()
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            kind = GGMLQuantizationType[types[name]]
            blocks = file.get_tensor(name).numpy()
            values = blocks.view(np.float32) if kind is GGMLQuantizationType.F32 else dequantize(blocks, kind)
            tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _stamp(target)


def store(model: Path, target: Path) -> None:
    """The W4A16 checkpoint of a plain model: eight codes with offset 8 to a word, the first in its lowest bits."""
    _beside(model, target)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(str(model / "model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            layer, _, kind = name.rpartition(".")
            tensors |= _packed(layer, file.get_tensor(name)) if layer.endswith("_proj") and kind == "weight" else {
                name: file.get_tensor(name)
            }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": None,
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
        }},
    }
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    _stamp(target)


def _packed(layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from lowbit.conformance.evals.quantise import RECIPES, quantise_linear  # what it needs there arrives in the parts
    from lowbit.references.formats import BF16

    linear = quantise_linear(RECIPES["w4a16"], layer, weight, BF16)
    codes = linear.constants["w"].codes.astype(np.uint32).reshape(linear.n, -1, 8)
    words = np.bitwise_or.reduce(codes << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    scale = torch.from_numpy(linear.constants["scale"].codes.view(np.int16).copy()).view(torch.bfloat16)
    return {
        f"{layer}.weight_packed": torch.from_numpy(words.view(np.int32)), f"{layer}.weight_scale": scale,
        f"{layer}.weight_shape": torch.tensor([linear.n, linear.k]),
    }


_STEPS: Mapping[str, Callable[[Path, Path], object]] = {
    "pack": pack, "split": split, "join": join, "unpack": unpack, "store": store,
}


def main(arguments: list[str] | None = None, told: IO[str] = sys.stderr) -> int:
    """0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("step", choices=_STEPS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args(arguments)
    try:
        done = _STEPS[given.step](given.source, given.target)
    except (TransportError, FileExistsError) as error:
        print(f"{given.step}: {error}", file=told)
        return 1
    print(f"{given.step}: {given.target}{'' if done is None else f', {done} parts'}", file=told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
