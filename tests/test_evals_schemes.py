"""Quantization configs to ops: what is supported, and one sentence for what is not (EVA-1)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from lowbit.conformance.evals.schemes import Scheme, SchemeError, read_schemes
from lowbit.conformance.op import outside_domain, parse_problem
from lowbit.conformance.ops import ops


def part(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    """Weights or activations as compressed-tensors writes them."""
    return {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": bits, "observer": "minmax",
        "observer_kwargs": {}, "strategy": strategy, "symmetric": True, "type": kind,
    } | more


def config(storage: str, weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A config.json with one group."""
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {"model_type": "llama", "quantization_config": {
        "config_groups": {"group_0": group},
        "format": storage, "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    } | more}


FP8_TOKEN = part("float", 8, "token", dynamic=True, observer=None)
INT8_TOKEN = part("int", 8, "token", dynamic=True, observer=None)
W4A8_FP8 = config("pack-quantized", part("int", 4, "group", group_size=128, actorder="weight"), FP8_TOKEN)
W4A8_INT8 = config("int-quantized", part("int", 4, "group", group_size=128), INT8_TOKEN, sparsity_config={}, transform_config={},
                   version="0.11.0")
NVFP4 = part("float", 4, "tensor_group", group_size=16)

SUPPORTED = [
    (W4A8_FP8, Scheme("group_0", "gemm_w4a8_fp8", "folded", "pack-quantized", 128)),
    (W4A8_INT8, Scheme("group_0", "gemm_w4a8_int8", "direct", "int-quantized", 128)),
    (config("pack-quantized", part("int", 4, "group", group_size=32), None),
     Scheme("group_0", "gemm_w4a16", "sym", "pack-quantized", 32)),
    (config("pack-quantized", part("int", 4, "group", group_size=64, symmetric=False), None),
     Scheme("group_0", "gemm_w4a16", "zp", "pack-quantized", 64, symmetric=False)),
    (config("pack-quantized", part("int", 4, "channel"), None), Scheme("group_0", "gemm_w4a16", "sym", "pack-quantized", 0)),
    (config("pack-quantized", part("int", 4, "channel", group_size=-1), INT8_TOKEN),
     Scheme("group_0", "gemm_w4a8_int8", "direct", "pack-quantized", 0)),
    (config("float-quantized", part("float", 8, "channel"), FP8_TOKEN),
     Scheme("group_0", "gemm_w8a8_fp8", "scaled", "float-quantized", 0)),
    (config("float-quantized", part("float", 8, "tensor"), part("float", 8, "tensor")),
     Scheme("group_0", "gemm_w8a8_fp8", "scaled", "float-quantized", 0, True, True, True, True)),
    (config("float-quantized", part("float", 8, "block", block_structure=[128, 128]),
            part("float", 8, "group", group_size=128, dynamic=True)),
     Scheme("group_0", "gemm_w8a8_fp8", "block", "float-quantized", 128)),
    (config("nvfp4-pack-quantized", NVFP4, NVFP4 | {"dynamic": "local"}),
     Scheme("group_0", "gemm_nvfp4", "plain", "nvfp4-pack-quantized", 16)),
]


@pytest.mark.parametrize(("given", "scheme"), SUPPORTED)
def test_a_supported_config_is_one_op(given: dict[str, Any], scheme: Scheme) -> None:
    found = read_schemes(given)
    assert found.of("model.layers.0.self_attn.q_proj") == scheme
    assert found.of("lm_head") is None
    assert read_schemes(given["quantization_config"]) == found


@pytest.mark.parametrize(("given", "scheme"), SUPPORTED)
def test_every_scheme_is_in_the_domain_of_its_op(given: dict[str, Any], scheme: Scheme) -> None:
    k = 4096
    dims = {"m": 17, "n": 1024, "k": k, "g": scheme.group or k, "r": 0}
    op = ops()[scheme.op]
    letters = "".join(f"{letter}{dims[letter]}" for letter in op.dims)
    assert outside_domain(op, parse_problem(f"{scheme.op}/{scheme.variant}/{letters}/bf16", ops())) is None


def edited(given: dict[str, Any], edit: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A copy with one thing changed; `edit` gets the group's weights, inputs and the whole as a dict."""
    copied = copy.deepcopy(given)
    whole = copied["quantization_config"]
    group = whole["config_groups"]["group_0"]
    edit({"weights": group["weights"], "inputs": group["input_activations"], "group": group, "whole": whole})
    return copied


@pytest.mark.parametrize(("given", "said"), [
    (edited(W4A8_FP8, lambda c: c["weights"].update(actorder="group")),
     "config group 'group_0': weights have actorder 'group', which permutes K by weight_g_idx; supported are null, 'weight' and "
     "'static', which keep it; quantise again with actorder='weight'"),
    (edited(W4A8_FP8, lambda c: c["weights"].update(group_size=32)),
     "config group 'group_0': found pack-quantized weights int4 group of 32 with inputs float8 token dynamic; supported: "
     "gemm_w4a8_fp8: pack-quantized, int4 group (group 64/128), inputs float8 token dynamic; change what differs and quantise "
     "again"),
    (edited(W4A8_FP8, lambda c: c["weights"].update(symmetric=False)), "weights int4 group of 128 with zero points"),
    (edited(W4A8_FP8, lambda c: c["weights"].update(num_bits=8)), "found pack-quantized weights int8 group of 128"),
    (edited(W4A8_FP8, lambda c: c["inputs"].update(dynamic=False)), "with inputs float8 token static; supported: gemm_w4a16"),
    (edited(W4A8_FP8, lambda c: c["weights"].update(dynamic=True)), "weights are dynamic"),
    (edited(W4A8_FP8, lambda c: c["whole"].update(format="marlin-24")), "found marlin-24 weights"),
    (edited(W4A8_FP8, lambda c: c["group"].update(output_activations=INT8_TOKEN)), "quantises output_activations"),
    (edited(W4A8_FP8, lambda c: c["group"].update(weights=None)), "config group 'group_0' has no weights"),
    (edited(W4A8_FP8, lambda c: c["group"].update(targets="Linear")), "targets is 'Linear'; expected a list of names"),
    (edited(W4A8_FP8, lambda c: c["whole"].update(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme is set"),
    (edited(W4A8_FP8, lambda c: c["whole"].update(quantization_status="frozen")), "quantization_status is 'frozen'"),
    (edited(W4A8_FP8, lambda c: c["whole"].update(config_groups={})), "config_groups is empty"),
    (edited(W4A8_FP8, lambda c: c["whole"].update(quant_method="gptq")), "is 'gptq'; supported is 'compressed-tensors'"),
    (config("float-quantized", part("float", 8, "block", block_structure=[64, 128]),
            part("float", 8, "group", group_size=128, dynamic=True)), r"block_structure is [64, 128], supported is [128, 128]"),
    ({"model_type": "llama"}, "quant_method is None"),
])
def test_what_is_not_supported_is_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemeError) as caught:
        read_schemes(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_groups_own_format_goes_before_that_of_the_whole() -> None:
    given = edited(W4A8_INT8, lambda c: (c["group"].update(format="pack-quantized"), c["whole"].update(format="mixed-precision")))
    found = read_schemes(given).of("x", "Linear")
    assert found is not None
    assert found.storage == "pack-quantized"


@pytest.mark.parametrize(("targets", "ignore", "layer", "kind", "named"), [
    (["Linear"], [], "a.b", "Linear", True),
    (["Linear"], [], "a.b", "Embedding", False),
    (["re:.*q_proj$"], [], "model.q_proj", "Linear", True),
    (["re:.*q_proj$"], [], "model.q_proj.extra", "Linear", False),
    (["q_proj"], [], "model.layers.0.q_proj", "Linear", True),
    (["q_proj"], [], "model.layers.0.seq_proj", "Linear", False),
    (["Linear"], ["re:.*lm_head"], "lm_head", "Linear", False),
    (["Linear"], ["model.layers.0.q_proj"], "model.layers.0.q_proj", "Linear", False),
    (["Linear"], ["model.layers.0.q_proj"], "model.layers.10.q_proj", "Linear", True),
])
def test_targets_and_ignored_layers(targets: list[str], ignore: list[str], layer: str, kind: str, named: bool) -> None:
    given = edited(W4A8_FP8, lambda c: (c["group"].update(targets=targets), c["whole"].update(ignore=ignore)))
    assert (read_schemes(given).of(layer, kind) is not None) == named


def test_the_first_group_that_names_a_layer_wins() -> None:
    other = {"input_activations": None, "targets": ["re:.*down_proj"], "weights": part("int", 4, "group", group_size=32)}
    both = W4A8_FP8["quantization_config"]["config_groups"]
    found = read_schemes(edited(W4A8_FP8, lambda c: c["whole"].update(config_groups={"narrow": other, **both})))
    narrow, wide = found.of("x.down_proj"), found.of("x.up_proj")
    assert narrow is not None
    assert wide is not None
    assert (narrow.op, narrow.group, wide.op, wide.group) == ("gemm_w4a16", 32, "gemm_w4a8_fp8", 128)
