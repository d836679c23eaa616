"""What only a GPU shows: the kernels' accuracy in bf16, which of them runs, and that the host does not wait."""

import copy

import pytest
import torch

import slipstream
from slipstream.attention.causal import attention_reference, backward_reference, causal_attention, whole_rows
from tests.tiny_models import tiny_batch, tiny_model

pytestmark = pytest.mark.gpu

B, S = 2, 320
# Documents of 1 to 300 tokens, an empty one among them; none spans two rows.
PACKED = [0, 1, 20, 20, 320, 450, 640]


def truth(query, key, value, sinks, grad, scale, cu_seqlens, window):
    """Output and gradients in fp64."""
    *inputs, grad = (x.detach().double() for x in (query, key, value, grad))
    out, lse = attention_reference(*inputs, cu_seqlens, scale, window)
    sinks = None if sinks is None else sinks.detach().double()
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks[:, None]).t().view(B, S, -1, 1)
        lse = torch.logaddexp(lse, sinks[:, None])
    grads = backward_reference(grad, *inputs, out, lse, cu_seqlens, scale, window)
    if sinks is None:
        return [out, *grads]
    delta = (grad * out).sum(-1).view(B * S, -1).t()
    return [out, *grads, -(torch.exp(sinks[:, None] - lse) * delta).sum(1)]


@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("case", ["rows", "alike", "packed", "window", "packed, window"])
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 1, 64), (8, 2, 128), (4, 4, 192), (4, 2, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_output_and_gradients(dtype, heads, groups, width, case, with_sinks) -> None:
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda").to(dtype).requires_grad_()

    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32, device="cuda") if "packed" in case else None
    window = 50 if "window" in case else None
    if cu_seqlens is None and window is not None:
        cu_seqlens = whole_rows(B, S, torch.device("cuda"))
    inputs = [draw(B, S, heads, width), draw(B, S, groups, width), draw(B, S, groups, width)]
    # Laid out as a model's: heads before tokens.
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    sinks = draw(heads) if with_sinks else None
    max_length = None if cu_seqlens is None else torch.tensor(S)
    if case == "alike":
        cu_seqlens, max_length = whole_rows(2 * B, S // 2, torch.device("cuda")), torch.tensor(S // 2)
    out = causal_attention(*inputs, width**-0.5, sinks, cu_seqlens, max_length, window)
    grad = torch.randn_like(out)
    out.backward(grad)
    got = [out.detach(), *(x.grad for x in inputs), *([sinks.grad] if with_sinks else [])]
    expected = truth(*inputs, sinks, grad, width**-0.5, cu_seqlens, window)
    for name, mine, exact in zip(["out", "query", "key", "value", "sinks"], got, expected, strict=False):
        assert mine.dtype == dtype
        assert (mine.double() - exact).norm() <= 0.01 * exact.norm(), name


def kernels(run) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profiler.key_averages())


def accelerated(model_type: str, dtype: torch.dtype = torch.bfloat16, **changes: object):
    model = tiny_model(model_type, None, head_dim=64, **changes).to("cuda", dtype)
    model.config.use_cache = False
    model = slipstream.accelerate(model)
    assert slipstream.describe(model)["attn"].chosen == "slipstream"
    return model


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_which_kernel_runs(model_type: str) -> None:
    model = accelerated(model_type, num_hidden_layers=2)
    ids = tiny_batch(1, 256).cuda()
    positions = torch.cat([torch.arange(100), torch.arange(156)])[None].cuda()
    plain = kernels(lambda: model(input_ids=ids))
    alike = kernels(lambda: model(input_ids=ids, position_ids=torch.arange(128, device="cuda").repeat(2)[None]))
    packed = kernels(lambda: model(input_ids=ids, position_ids=positions))
    if torch.cuda.get_device_capability()[0] == 9:
        assert "cudnn" in plain
        # GPT-OSS has windows in every other layer.
        assert "cudnn" in alike
    assert "flash_fwd" in packed
    assert "cudnn" not in packed


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "mistral"])
def test_packed_is_separate_documents(model_type: str) -> None:
    exact = tiny_model(model_type, None, head_dim=64).cuda()
    ids = tiny_batch(1, 256).cuda()
    lengths = [56, 199, 1]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    with torch.no_grad():
        expected = torch.cat([exact(input_ids=x, use_cache=False).logits for x in ids.split(lengths, 1)], 1)
        packed = slipstream.accelerate(copy.deepcopy(exact))(input_ids=ids, position_ids=positions, use_cache=False)
        assert (packed.logits - expected).norm() <= 1e-3 * expected.norm()  # fp32, TF32 or not
        model = slipstream.accelerate(exact.bfloat16())
        packed = model(input_ids=ids, position_ids=positions, use_cache=False)
        # What a layer's rounding makes of two documents alone is the measure.
        alone = torch.cat([model(input_ids=x, use_cache=False).logits for x in ids.split(lengths, 1)], 1)
    allowed = 1.5 * (alone.float() - expected).norm() + 0.01 * expected.norm()
    assert (packed.logits.float() - expected).norm() <= allowed


@pytest.mark.parametrize("given", ["nothing", "lengths"])
def test_the_host_does_not_wait(given: str) -> None:
    model = accelerated("llama", num_hidden_layers=2).base_model
    ids = tiny_batch(1, 256).cuda()
    inputs = {}
    if given == "lengths":
        cu_seqlens = torch.tensor([0, 100, 256], dtype=torch.int32, device="cuda")
        positions = torch.cat([torch.arange(100), torch.arange(156)])[None].cuda()
        inputs = {"position_ids": positions, "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens,
                  "max_length_q": 156, "max_length_k": 156}  # fmt: skip
    out = model(input_ids=ids, **inputs).last_hidden_state  # once, so that kernels are loaded
    out.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=ids, **inputs).last_hidden_state.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_compiled_layers(model_type: str) -> None:
    """By inductor, with other lengths and other numbers of documents."""
    torch._dynamo.reset()
    model = accelerated(model_type, torch.float16, num_hidden_layers=2)
    plain = copy.deepcopy(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.forward = torch.compile(attention.forward, dynamic=True, fullgraph=True)
    for lengths in ([100, 28], [64, 1, 127], [200], [3, 3, 3, 247]):
        ids = tiny_batch(1, sum(lengths)).cuda()
        positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
        results = []
        for m in (model, plain):
            m.zero_grad()
            out = m.base_model(input_ids=ids, position_ids=positions).last_hidden_state
            out.float().square().sum().backward()
            results.append((out, m.base_model.layers[0].self_attn.q_proj.weight.grad))
        for got, expected in zip(*results, strict=True):
            assert (got - expected).norm() <= 0.02 * expected.norm()
