"""Models with `attn="slipstream"` against Transformers' own attention, in fp32: loss and every gradient."""

import copy
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import slipstream
from slipstream import BackendConfig
from slipstream.attention import interface
from slipstream.attention.rows import Segments
from slipstream.coverage.tiny import tiny_model as coverage_tiny_model
from tests.tiny_models import tiny_batch, tiny_model

# Longer than the tiny models' window of 32.
LENGTH = 48
LENGTHS = [5, 40, 3]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
IDS = tiny_batch(2, LENGTH)
# Sinks; windows; heads of two widths; both windows and sinks; neither.
ARCHITECTURES = ["gpt_oss", "granitemoe_swa", "flint", "mimo_v2_flash", "mistral", "gemma3_text", "deepseek_v3",
                 "mixtral", "afmoe", "qwen3_moe", "llama"]  # fmt: skip


def pair(model_type: str, **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = tiny_model(model_type, **changes)
    plain.config.use_cache = False
    backend = BackendConfig(attn="slipstream", experts="transformers")
    return plain, slipstream.accelerate(copy.deepcopy(plain), backend=backend)


def run(model: PreTrainedModel, **inputs: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected) -> None:
    """The bound of test_parity.py: every gradient against the median of their largest values."""
    assert abs(got[0] - expected[0]) <= 1e-5 * abs(expected[0])
    assert got[1].keys() == expected[1].keys()
    scale = torch.stack([grad.abs().max() for grad in expected[1].values()]).median()
    for name, grad in expected[1].items():
        error = (got[1][name] - grad).abs().max()
        assert error <= 1e-5 * torch.maximum(grad.abs().max(), scale), (name, error.item())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_whole_rows(model_type: str) -> None:
    plain, ours = pair(model_type)
    for use_cache in (False, True):
        expected = run(plain, input_ids=IDS, labels=IDS, use_cache=use_cache)
        assert_same(run(ours, input_ids=IDS, labels=IDS, use_cache=use_cache), expected)


@pytest.mark.parametrize("given", ["positions", "lengths", "both"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_packed_is_separate_documents(model_type: str, given: str) -> None:
    """Transformers' own GPT-OSS and AFMoE let packed documents see each other; these are run one by one here."""
    plain, ours = pair(model_type)
    ids = IDS[:1]
    labels = ids.clone()
    labels[0, [0, 5, 45]] = -100  # a document's first token is nobody's label
    parts = zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True)
    count = LENGTH - len(LENGTHS)
    plain.zero_grad()
    total = sum(plain(input_ids=x, labels=y, num_items_in_batch=count).loss for x, y in parts)
    total.backward()
    expected = total.detach(), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    cu_seqlens = torch.tensor([0, 5, 45, 48], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 40, "max_length_k": 40}
    inputs = {"position_ids": POSITIONS} if given != "lengths" else {}
    if given != "positions":
        inputs |= lengths
    if given == "lengths":  # the lengths do not tell a model its positions
        assert ours(input_ids=ids, **inputs).logits.isfinite().all()
        ours.register_forward_pre_hook(lambda m, a, k: (a, k | {"position_ids": POSITIONS}), with_kwargs=True)
    assert_same(run(ours, input_ids=ids, labels=labels, num_items_in_batch=count, **inputs), expected)


@pytest.mark.parametrize("model_type", ["gpt_oss", "mistral", "qwen3_moe"])
def test_no_document_sees_its_neighbour(model_type: str) -> None:
    """Not a bit of gradient crosses; the values may round differently, since experts group tokens of all documents."""
    _, ours = pair(model_type, num_hidden_layers=2)
    embeds, direction = torch.randn(1, LENGTH, 64), torch.randn(1, 40, 64)
    others = embeds.clone()
    others[:, :5], others[:, 45:] = torch.randn(1, 5, 64), torch.randn(1, 3, 64)
    results = []
    for x in (embeds, others):
        x = x.clone().requires_grad_()
        out = ours.base_model(inputs_embeds=x, position_ids=POSITIONS).last_hidden_state
        (out[:, 5:45] * direction).sum().backward()
        assert x.grad[:, :5].abs().max() == 0
        assert x.grad[:, 45:].abs().max() == 0
        results.append((out[:, 5:45], x.grad[:, 5:45]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left", "both", "hole"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "mistral", "qwen3_moe"])
def test_padding(model_type: str, side: str) -> None:
    plain, ours = pair(model_type)
    mask = torch.ones_like(IDS)
    for padding in {"right": [slice(30, 48)], "left": [slice(0, 7)], "both": [slice(0, 7), slice(40, 48)],
                    "hole": [slice(20, 25)]}[side]:  # fmt: skip
        mask[1, padding] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    # The token after padding is predicted from padding, whose hidden states mean nothing anywhere.
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
    assert_same(run(ours, **inputs), run(plain, **inputs))


@pytest.mark.parametrize("model_type", ["gpt_oss", "mistral", "mimo_v2_flash"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(model_type: str, cache: str) -> None:
    plain, ours = pair(model_type)
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "cache_implementation": cache,
               "disable_compile": True}  # fmt: skip
    for model in (plain.eval(), ours.eval()):
        model.generation_config.eos_token_id = None
    expected = plain.generate(IDS, attention_mask=mask, **options)
    assert torch.equal(ours.generate(IDS, attention_mask=mask, **options), expected)


def test_dropout_and_soft_caps_keep_the_mask() -> None:
    """What the op does not compute, on documents all the same."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    segments = Segments(torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor(4))
    sinks = torch.randn(4)
    plain, _ = interface.attention_forward(module, query, key, value, segments, s_aux=sinks)
    whole, _ = interface.attention_forward(module, query, key, value, segments, s_aux=sinks, softcap=1e6)
    torch.testing.assert_close(plain, whole, rtol=1e-4, atol=1e-5)
    bias = torch.zeros(1, 4, 6, 6)
    biased, _ = interface.attention_forward(module, query, key, value, segments, position_bias=bias)
    expected, _ = sdpa_attention_forward(module, query, key, value, segments.as_mask(1, 6))
    torch.testing.assert_close(biased, expected)
    torch.manual_seed(0)
    dropped, _ = interface.attention_forward(module, query, key, value, segments, s_aux=sinks, dropout=0.5)
    assert not torch.allclose(dropped, plain)
    value = value.clone()
    value[:, :, :2] = 1e9  # the second document must not see it
    torch.manual_seed(0)
    again, _ = interface.attention_forward(module, query, key, value, segments, s_aux=sinks, dropout=0.5)
    assert torch.equal(again[:, 2:], dropped[:, 2:])


def test_a_mask_of_ones_and_plain_rows_go_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair("llama", num_hidden_layers=2)
    masks = []
    monkeypatch.setattr(
        slipstream.hf, "sdpa_attention", lambda m, q, k, v, mask, **kw: masks.append(mask) or sdpa_attention_forward(
            m, q, k, v, mask, **kw
        )
    )  # fmt: skip
    for inputs in ({}, {"attention_mask": torch.ones_like(IDS)}, {"position_ids": torch.arange(LENGTH)[None]}):
        masks.clear()
        ours(input_ids=IDS, **inputs)
        assert masks == [None, None]


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_implementation_afterwards_keeps_documents_apart(other: str) -> None:
    plain, ours = pair("qwen3_moe", num_hidden_layers=2)
    ours.set_attn_implementation(other)
    inputs = {"input_ids": IDS[:1], "position_ids": POSITIONS, "labels": IDS[:1]}
    assert_same(run(ours, **inputs), run(plain, **inputs))
    ours.set_attn_implementation("slipstream")
    assert_same(run(ours, **inputs), run(plain, **inputs))


def test_documents_are_looked_for_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair("mimo_v2_flash")  # two kinds of masks
    calls = []
    monkeypatch.setattr(interface, "rows_of", lambda kw, f=interface.rows_of: calls.append(1) or f(kw))
    original = masking_utils.find_packed_sequence_indices.original
    assert isinstance(original, types.FunctionType)
    ours(input_ids=IDS[:1], position_ids=POSITIONS, labels=IDS[:1]).loss.backward()
    assert len(calls) == 1
    assert interface.known_rows(1, LENGTH) is None  # nothing stays behind


@pytest.mark.parametrize("model_type", ["bart", "whisper", "opt"])
def test_decoders_of_pairs_have_their_rows_known(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their wrapper is not run, and asking the device whether a mask masks anything would make the host wait."""
    plain = coverage_tiny_model(model_type).eval()  # without dropout
    plain.config.use_cache = False
    ours = slipstream.accelerate(copy.deepcopy(plain), backend=BackendConfig(attn="slipstream"))
    expected = run(plain, input_ids=IDS, labels=IDS)
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: pytest.fail("the mask was read"))
    assert_same(run(ours, input_ids=IDS, labels=IDS), expected)


@pytest.mark.parametrize("model_type", ["bart", "bert"])
def test_another_sequence_of_the_same_length_has_a_mask_of_its_own(model_type: str) -> None:
    plain = coverage_tiny_model(model_type)
    if model_type == "bert":
        plain = type(plain)(
            type(plain.config)(**{**plain.config.to_dict(), "is_decoder": True, "add_cross_attention": True})
        )
    ours = slipstream.accelerate(copy.deepcopy(plain), backend=BackendConfig(attn="slipstream"))
    mask = torch.ones_like(IDS)
    mask[1, 20:] = 0
    inputs = {
        "encoder_hidden_states": torch.randn(*IDS.shape, plain.config.hidden_size),
        "encoder_attention_mask": mask,
        "use_cache": False,
    }
    expected = run(plain.eval(), input_ids=IDS, labels=IDS, **inputs)
    assert_same(run(ours.eval(), input_ids=IDS, labels=IDS, **inputs), expected)


def test_an_error_leaves_nothing_behind() -> None:
    _, ours = pair("llama", num_hidden_layers=2)
    with pytest.raises(IndexError):
        ours(input_ids=torch.full((1, LENGTH), 10_000), position_ids=POSITIONS)
    assert interface.known_rows(1, LENGTH) is None


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_compiled_layers_are_not_compiled_anew(model_type: str) -> None:
    """Other lengths, other numbers of documents: no compilation anew, no graph break."""
    torch._dynamo.reset()
    plain, ours = pair(model_type, num_hidden_layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in ours.model.layers:
        attention = layer.self_attn
        attention.forward = torch.compile(attention.forward, backend=counter, dynamic=True, fullgraph=True)
    counts = []
    for lengths in ([5, 40, 3], [20, 44], [10, 20, 30, 40], [1, 1, 70]):
        ids = tiny_batch(1, sum(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        out = ours.base_model(input_ids=ids, position_ids=positions).last_hidden_state
        out.square().sum().backward()
        expected = torch.cat([plain.base_model(input_ids=x).last_hidden_state for x in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 4


def test_gradient_checkpointing() -> None:
    plain, ours = pair("gpt_oss")
    ours.gradient_checkpointing_enable()
    inputs = {"input_ids": IDS[:1], "labels": IDS[:1]}
    assert_same(run(ours, **inputs), run(plain, **inputs))
    packed = run(ours, **inputs, position_ids=POSITIONS)
    ours.gradient_checkpointing_disable()
    assert_same(run(ours, **inputs, position_ids=POSITIONS), packed)


def test_autocast() -> None:
    _, ours = pair("gpt_oss")
    exact = ours(input_ids=IDS, labels=IDS).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert abs(loss - exact) < 0.02 * exact


def test_who_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "has_device", lambda: True)

    def chosen(model: PreTrainedModel, **backend: str) -> str:
        model = slipstream.accelerate(model, backend=backend)
        choice = slipstream.describe(model)["attn"]
        assert slipstream.hf.attention_implementation(model) == choice.chosen
        return choice.chosen

    assert chosen(tiny_model("qwen3_moe")) == "slipstream"
    assert chosen(tiny_model("gpt_oss")) == "slipstream"
    assert chosen(tiny_model("qwen3_moe"), attn="sdpa") == "sdpa"
    assert chosen(tiny_model("gpt_oss"), attn="eager") == "eager"
    # Sparse attention reads its mask; Gemma 2 caps its scores.
    assert chosen(tiny_model("deepseek_v32")) == "sdpa"
    assert chosen(tiny_model("gemma2")) == "eager"
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    assert chosen(eager) == "eager"
    with pytest.raises(ValueError, match="attn='auto'"):
        chosen(tiny_model("gemma2"), attn="slipstream")
    monkeypatch.undo()
    if not interface.has_device():
        assert chosen(tiny_model("qwen3_moe")) == "sdpa"


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_what_the_caller_loads_with_stays(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "has_device", lambda: True)
    config = tiny_model("llama").config
    model = slipstream.AutoModelForCausalLM.from_config(config, attn_implementation=asked)
    assert slipstream.describe(model)["attn"].chosen == asked
    model = slipstream.AutoModelForCausalLM.from_config(config)
    assert slipstream.describe(model)["attn"].chosen == "slipstream"
