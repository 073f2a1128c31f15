# SPDX-License-Identifier: Apache-2.0
"""Which ports a model has: exact names and kinds, written down by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from calib.errors import ModelError
from calib.models import open_model
from calib.sites import KINDS, Port, find_ports

LLAMA_LAYER = {
    (":output", "residual"),
    ("input_layernorm:input", "residual"),
    ("input_layernorm:output", "norm_output"),
    ("self_attn:query", "query"),
    ("self_attn:key", "key"),
    ("self_attn:value", "value"),
    *((f"self_attn.{p}_proj:input", "linear_input") for p in "qkvo"),
    *((f"self_attn.{p}_proj:output", "linear_output") for p in "qkvo"),
    ("self_attn.o_proj:output", "attention_output"),
    ("post_attention_layernorm:input", "residual"),
    ("post_attention_layernorm:output", "norm_output"),
    *((f"mlp.{p}_proj:input", "linear_input") for p in ("gate", "up", "down")),
    *((f"mlp.{p}_proj:output", "linear_output") for p in ("gate", "up", "down")),
    ("mlp.act_fn:input", "gate"),
    ("mlp.down_proj:output", "mlp_output"),
}
GPT2_LAYER = {
    (":output", "residual"),
    ("ln_1:input", "residual"),
    ("ln_1:output", "norm_output"),
    ("attn:query", "query"),
    ("attn:key", "key"),
    ("attn:value", "value"),
    *((f"{m}:input", "linear_input") for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    *((f"{m}:output", "linear_output") for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    ("attn.c_proj:output", "attention_output"),
    ("ln_2:input", "residual"),
    ("ln_2:output", "norm_output"),
    ("mlp.act:input", "gate"),
    ("mlp.c_proj:output", "mlp_output"),
}
BERT_LINEAR = (
    *(f"attention.self.{p}" for p in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
BERT_LAYER = {
    (":output", "residual"),
    *((f"attention.self:{p}", p) for p in ("query", "key", "value")),
    *((f"{m}:input", "linear_input") for m in BERT_LINEAR),
    *((f"{m}:output", "linear_output") for m in BERT_LINEAR),
    ("attention.output.dense:output", "attention_output"),
    ("attention.output.LayerNorm:input", "residual"),
    ("attention.output.LayerNorm:output", "norm_output"),
    ("intermediate.intermediate_act_fn:input", "gate"),
    ("output.dense:output", "mlp_output"),
    ("output.LayerNorm:input", "residual"),
    ("output.LayerNorm:output", "norm_output"),
}
ALBERT_LINEAR = (*(f"attention.{p}" for p in ("query", "key", "value", "dense")), "ffn", "ffn_output")
ALBERT_LAYER = {
    (":input", "residual"),
    (":output", "residual"),
    *((f"attention:{p}", p) for p in ("query", "key", "value")),
    *((f"{m}:input", "linear_input") for m in ALBERT_LINEAR),
    *((f"{m}:output", "linear_output") for m in ALBERT_LINEAR),
    ("attention.dense:output", "attention_output"),
    ("attention.LayerNorm:input", "residual"),
    ("attention.LayerNorm:output", "norm_output"),
    ("activation:input", "gate"),
    ("ffn_output:output", "mlp_output"),
    ("full_layer_layer_norm:input", "residual"),
    ("full_layer_layer_norm:output", "norm_output"),
}


def layers(prefix: str, number: int, of_one: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The ports of one layer in each of a stack, and the input of the first."""
    named = {
        (f"{prefix}.{i}{'' if port.startswith(':') else '.'}{port}", kind)
        for i in range(number)
        for port, kind in of_one
    }
    return named | {(f"{prefix}.0:input", "residual")}


EXPECTED = {
    "tiny_llama": layers("model.layers", 3, LLAMA_LAYER)
    | {
        ("model.embed_tokens:output", "embedding"),
        ("model.norm:output", "final_norm"),
        ("lm_head:input", "linear_input"),
    },
    "tiny_gpt2": layers("transformer.h", 2, GPT2_LAYER)
    | {
        ("transformer.wte:output", "embedding"),
        ("transformer.ln_f:output", "final_norm"),
        ("lm_head:input", "linear_input"),
    },
    "tiny_bert": layers("bert.encoder.layer", 2, BERT_LAYER)
    | {
        ("bert.embeddings.word_embeddings:output", "embedding"),
        ("bert.embeddings.LayerNorm:output", "norm_output"),
        ("cls.predictions.transform.dense:input", "linear_input"),
        ("cls.predictions.transform.dense:output", "linear_output"),
        ("cls.predictions.transform.LayerNorm:output", "norm_output"),
        ("cls.predictions.decoder:input", "linear_input"),
    },
    "rxnmapper": layers("albert.encoder.albert_layer_groups.0.albert_layers", 1, ALBERT_LAYER)
    | {
        ("albert.embeddings.word_embeddings:output", "embedding"),
        ("albert.embeddings.LayerNorm:output", "norm_output"),
        ("albert.encoder.embedding_hidden_mapping_in:input", "linear_input"),
        ("albert.encoder.embedding_hidden_mapping_in:output", "linear_output"),
        ("predictions.dense:input", "linear_input"),
        ("predictions.dense:output", "linear_output"),
        ("predictions.LayerNorm:output", "norm_output"),
        ("predictions.decoder:input", "linear_input"),
    },
}


def ports_of(folder: Path) -> list[Port]:
    return find_ports(open_model(folder, device="cpu").model)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_names_and_kinds_are_exactly_these(name: str, request: pytest.FixtureRequest) -> None:
    ports = ports_of(request.getfixturevalue(name))
    found = [(port.name, port.kind) for port in ports]
    assert len(found) == len(set(found))
    assert set(found) == EXPECTED[name]


def test_ports_come_in_module_order_with_inputs_before_outputs(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    order = [name for name, _ in model.named_modules()]
    ports = find_ports(model)
    assert [order.index(port.module) for port in ports] == sorted(port.order for port in ports)
    down = [port.port for port in ports if port.module == "model.layers.1.mlp.down_proj"]
    assert down == ["input", "output", "output"]


def test_only_what_is_in_a_block_has_a_layer(tiny_llama: Path) -> None:
    for port in ports_of(tiny_llama):
        parts = port.module.split(".")
        assert port.layer == (int(parts[2]) if parts[:2] == ["model", "layers"] else None), port.name


def test_the_input_of_a_norm_is_named_by_others_if_they_know_better(tiny_llama: Path) -> None:
    assert {port.name.rpartition(".")[2] for port in ports_of(tiny_llama) if port.weak} == {
        "input_layernorm:input",
        "post_attention_layernorm:input",
    }


def test_the_output_projection_is_found_where_it_is_not_the_last_one() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    found = {port.kind: port.name for port in find_ports(Phi3ForCausalLM(config))}
    assert found["attention_output"] == "model.layers.0.self_attn.o_proj:output"
    assert found["mlp_output"] == "model.layers.0.mlp.down_proj:output"


def test_a_subclass_of_linear_is_a_projection() -> None:
    class Own(nn.Linear):
        """As FalconLinear is."""

    ports = find_ports(nn.Sequential(Own(3, 4), nn.Linear(4, 5)))
    assert {port.name for port in ports} == {"0:input", "0:output", "1:input", "1:output"}


def test_convolutions_have_their_channels_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert {port.name: port.axes for port in find_ports(model)} == {
        "0:input": "channels_first",
        "0:output": "channels_first",
        "2:input": "tokens",
        "2:output": "tokens",
    }


def test_a_stack_of_equal_blocks_is_recognised_without_any_declaration() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList([Block(), Block()])

    found = {(port.name, port.kind) for port in find_ports(Model())}
    assert found == {
        ("stack.0:input", "residual"),
        *((f"stack.{i}{port}", kind) for i in (0, 1) for port, kind in (
            (":output", "residual"),
            (".linear:input", "linear_input"),
            (".linear:output", "linear_output"),
            (".linear:output", "mlp_output"),
            (".act:input", "gate"),
        )),
    }  # fmt: skip


def test_a_model_without_anything_to_measure_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^Flatten: no linear layer"):
        find_ports(nn.Flatten())


def test_every_kind_of_a_port_is_a_known_one(tiny_bert: Path) -> None:
    assert {port.kind for port in ports_of(tiny_bert)} <= set(KINDS)
