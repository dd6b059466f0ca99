"""One kernel between qkv_proj and attention: SGLang's own blocks give with it what they give without, where it is used,
and what is seen and said at start."""

from __future__ import annotations

import logging
import pkgutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host import norm_rope as host
from mixquant_sglang.host.runtime import Pair, Runtime
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.layers import norm_rope
from mixquant_sglang.layers.norm_rope import Heads, NormRope, fastest, find, heads_of, install, prepare
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.versions import qk

SIZE, QUERIES, KEYS, HIDDEN, ROWS = 64, 4, 2, 32, 6
CUDA = torch.device("cuda")
BLOCKS = ("llama.LlamaAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention", "qwen3_moe.Qwen3MoeAttention")


class Linear(torch.nn.Module):
    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(n, k).bfloat16() * 0.1, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight.t(), None


class Norm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(SIZE).bfloat16(), requires_grad=False)
        self.variance_epsilon = 1e-6


def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    x = x.float().unflatten(-1, (-1, SIZE))
    return (x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight).bfloat16().flatten(1)


class Rope(torch.nn.Module):
    """In place, as SGLang's on CUDA, with the write of the cache if that is asked for."""

    is_neox_style, head_size, rotary_dim, use_fallback_kernel = True, SIZE, SIZE, False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", torch.rand(50, SIZE))

    def forward(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, fused_set_kv_buffer_arg: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (part[:, None] for part in self.cos_sin_cache[positions].chunk(2, -1))
        for x in (q, k):
            a, b = x.float().unflatten(-1, (-1, SIZE)).chunk(2, -1)
            x.copy_(torch.cat([a * cos - b * sin, a * sin + b * cos], -1).flatten(1))
        if fused_set_kv_buffer_arg is not None:
            keys, values, slots, v = fused_set_kv_buffer_arg
            keys[slots], values[slots] = k, v
        return q, k


class Attention(torch.nn.Module):
    """Of all keys of the pass, out of a cache that it writes or was written before."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.full((2, 20, KEYS * SIZE), 9.0).bfloat16()
        self.v_head_dim, self.k_scale, self.v_scale, self.saved = SIZE, None, None, []

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        self.saved.append(save_kv_cache)
        slots = batch.out_cache_loc[: len(q)]
        if save_kv_cache:
            self.cache[0, slots], self.cache[1, slots] = k, v
        keys, values = (part[slots].float() for part in self.cache)
        return (
            (torch.softmax(q[:, : KEYS * SIZE].float() @ keys.t(), -1) @ values).repeat(1, QUERIES // KEYS).bfloat16()
        )


def block(name: str) -> Any:
    kind = pkgutil.resolve_name(f"sglang.srt.models.{name}")
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    torch.manual_seed(0)
    made.num_heads, made.num_kv_heads, made.head_dim = QUERIES, KEYS, SIZE
    made.q_size, made.kv_size = QUERIES * SIZE, KEYS * SIZE
    made.qkv_proj, made.o_proj = Linear((QUERIES + 2 * KEYS) * SIZE, HIDDEN), Linear(HIDDEN, QUERIES * SIZE)
    made.q_norm, made.k_norm, made.rotary_emb, made.attn = Norm(), Norm(), Rope(), Attention()
    made.use_fused_qk_norm_mrope = made.use_fused_qk_norm_rope = made.use_fused_qk_norm_rope_cpu = False
    made.compatible_with_fused_kv_buffer, made.alt_stream = True, None
    return made


def batch(mode: str = "EXTEND", slots: int = ROWS) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(forward_mode=ForwardMode[mode], out_cache_loc=torch.arange(3, 3 + slots))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With torch in place of what runs on CUDA alone: SGLang's norms of heads, and ours.  The rows that ours ran."""
    from sglang.srt.models import qwen3, qwen3_moe

    ran: list[int] = []

    def apply_qk_norm(q: Any, k: Any, q_norm: Any, k_norm: Any, **_: Any) -> Any:
        q.copy_(normed(q, q_norm))
        k.copy_(normed(k, k_norm))
        return q, k

    def run(attention: Any, norm: bool, _tile: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        positions, keys, values, slots = rest
        ran.append(len(q))
        q = q.clone()
        if norm:
            apply_qk_norm(q, k, attention.q_norm, attention.k_norm)
        attention.rotary_emb(positions, q, k, (keys, values, slots, v))
        return q

    for module in (qwen3, qwen3_moe):
        monkeypatch.setattr(module, "apply_qk_norm", apply_qk_norm)
    execution = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    monkeypatch.setattr(qwen3, "get_exec", lambda: execution)

    def target(value: Any, layer: Any, forward_batch: Any) -> Any:
        return (*layer.cache, forward_batch.out_cache_loc, value)

    monkeypatch.setattr(qwen3_moe, "enable_fused_set_kv_buffer", lambda batch: True)
    monkeypatch.setattr(qwen3_moe, "create_fused_set_kv_buffer_arg", target)
    monkeypatch.setattr(norm_rope, "writes_with_rope", lambda batch: True)
    monkeypatch.setattr(norm_rope, "targets", lambda v, layer, batch: target(v, layer, batch)[:3])
    monkeypatch.setattr(norm_rope, "run", run)
    return ran


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_gives_what_it_gave(name: str, kernel: list[int]) -> None:
    """A layer of the served model's own class, in passes that take the kernel and in those that do not."""
    hidden, positions = torch.randn(ROWS, HIDDEN).bfloat16(), torch.randint(0, 50, (ROWS,))
    own, ours = block(name), block(name)
    heads = Heads(QUERIES, KEYS, SIZE, "qwen3" in name, "moe" in name)
    assert heads_of(ours) == heads
    for _ in range(2):  # as when another attention back end is built
        install(NormRope(heads, {"a": ours}, None, ROWS))
    with torch.no_grad():
        for mode in ("EXTEND", "MIXED", "DECODE", "TARGET_VERIFY"):
            want, got = (of(positions=positions, hidden_states=hidden, forward_batch=batch(mode)) for of in (own, ours))
            assert torch.equal(got, want) and torch.equal(ours.attn.cache, own.attn.cache), mode
    assert kernel == [ROWS, ROWS] and (own.attn.cache[:, 3 : 3 + ROWS] != 9).any()
    assert ours.attn.saved[:2] == [False, False] and ours.attn.saved[2:] == own.attn.saved[2:]
    with torch.no_grad():
        few = {"positions": positions[1:], "hidden_states": hidden[1:], "forward_batch": batch(slots=ROWS - 1)}
        assert torch.equal(ours(**few), own(**few))
    assert len(kernel) == 2


def test_only_blocks_that_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_rope, "attends_plainly", lambda attention: True)
    monkeypatch.setattr(norm_rope, "norm_source", lambda norm: "norm")
    monkeypatch.setattr(norm_rope, "why_not_plain", lambda rope, size: "half" * (rope.rotary_dim != size))
    model = torch.nn.Module()
    made = [block("qwen3.Qwen3Attention") for _ in range(7)]
    model.layers = torch.nn.ModuleList([*made, block("llama.LlamaAttention"), Attention()])
    made[1].head_dim = 96
    made[2].attn.k_scale = 1.0
    made[3].q_norm.variance_epsilon = 1e-5
    made[4].rotary_emb.rotary_dim = SIZE // 2
    made[5].num_heads = 8
    found, others = find(model)
    assert [*found] == ["layers.0", "layers.6"]
    assert {name: reason for reason, names in others.items() for name in names} == {
        "layers.1": "its heads have 96 elements",
        "layers.2": "its keys and values are scaled",
        "layers.3": "its norms are not SGLang's default",
        "layers.4": "half",
        "layers.5": "its heads are others than the first layer's",
        "layers.7": "its heads are others than the first layer's",
    }
    moe = block("qwen3_moe.Qwen3MoeAttention")
    moe.use_fused_qk_norm_rope = True
    assert norm_rope.why_not(moe) == "SGLang runs a fused kernel of its own there"


def test_rotary_embeddings_and_caches_of_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    rope = Rope()
    method = SimpleNamespace(__func__=RotaryEmbedding.forward_cuda)
    monkeypatch.setattr(qk, "dialect", lambda: SimpleNamespace(forward_method=lambda op: method))
    assert qk.why_not_plain(rope, SIZE) == ""
    for name, value in (("is_neox_style", False), ("rotary_dim", 32), ("use_fallback_kernel", True)):
        with monkeypatch.context() as patched:
            patched.setattr(rope, name, value, raising=False)
            assert qk.why_not_plain(rope, SIZE)
    method.__func__ = RotaryEmbedding.forward_native
    assert qk.why_not_plain(rope, SIZE) == "its Rope has a forward of its own"
    pool: Any = MHATokenToKVPool.__new__(MHATokenToKVPool)
    pool.dtype = pool.store_dtype = torch.bfloat16
    pool.kv_cache_layout = "nhd"
    assert qk.why_not_rows(pool) == ""
    pool.kv_cache_layout = "hnd"
    assert qk.why_not_rows(pool) == "its cache is not of plain rows"
    pool.dtype = torch.float8_e4m3fn
    assert qk.why_not_rows(pool) == "its cache holds torch.float8_e4m3fn"
    assert qk.why_not_rows(SimpleNamespace()) == "its cache is a SimpleNamespace"


def test_other_bits_or_no_gain_leave_all_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[Any, float] = {}
    monkeypatch.setattr(norm_rope, "Sample", lambda *_: None)
    monkeypatch.setattr(norm_rope, "timed", lambda _first, _sample, _device, rows, tile: seconds[tile is None, rows])
    monkeypatch.setattr(norm_rope, "same", lambda *_: True)
    attentions = {"a": block("qwen3.Qwen3Attention")}
    for rows, own in ((256, 0.9), (512, 1.5), (2048, 1.6), (8192, 2.0)):
        seconds |= {(True, rows): own, (False, rows): 1.0}
    found = prepare(attentions, 8192, torch.device("cpu"))
    assert isinstance(found, NormRope) and found.least == 512
    assert found.state() == {
        "layers": 1,
        "from": 512,
        "gain": {"256": 0.9, "512": 1.5, "2048": 1.6, "8192": 2.0},
    }
    assert (
        "one kernel in prefill passes of 512 rows or more, in 1 layers (the same bits; 0.90x at 256" in found.describe()
    )
    assert prepare(attentions, 200, torch.device("cpu")) == "passes are of at most 200 rows"
    seconds[True, 8192] = 1.01
    assert prepare(attentions, 8192, torch.device("cpu")) == "one kernel for all does not pay (1.60x at 2048 rows)"
    monkeypatch.setattr(norm_rope, "same", lambda _attention, _sample, rows, _tile: rows != 65)
    assert prepare(attentions, 8192, torch.device("cpu")) == (
        "the bits of one kernel are others than theirs, in a, of 65 rows"
    )
    monkeypatch.setattr(norm_rope, "same", lambda _attention, _sample, rows, _tile: rows != 2048)
    assert "in a, of 2048 rows, Tile(" in str(prepare(attentions, 8192, torch.device("cpu")))
    assert fastest(lambda rows, tile: 2.0 if tile is None else float(tile), (3, 1, 2), [5]) == (1, {5: 2.0})


def test_every_layer_is_compared_with_the_tile_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.kernels.triton.norm_rope import TILES

    compared: list[tuple[Any, int, Any]] = []
    monkeypatch.setattr(norm_rope, "Sample", lambda *_: None)
    times = {None: 9.0, **dict.fromkeys(TILES, 1.0), TILES[-1]: 0.5}
    monkeypatch.setattr(norm_rope, "timed", lambda _first, _sample, _device, _rows, tile: times[tile])
    monkeypatch.setattr(norm_rope, "same", lambda *args: compared.append((args[0], *args[2:])) or True)
    attentions = {name: block("qwen3.Qwen3Attention") for name in "ab"}
    found = prepare(attentions, 8192, torch.device("cpu"))
    assert isinstance(found, NormRope) and found.tile == TILES[-1]
    for attention in attentions.values():
        assert {rows for of, rows, tile in compared if of is attention and tile == found.tile} >= {*norm_rope.PROVED}


FOUND = NormRope(Heads(QUERIES, KEYS, SIZE, True, False), {}, None, 512, {512: 1.5})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    monkeypatch.setattr(host, "find", lambda model: model)
    monkeypatch.setattr(host, "prepare", lambda _attentions, most, _device: rows.append(most) or FOUND)
    monkeypatch.setattr(host, "dialect", lambda: SimpleNamespace(resolved=lambda args: args))
    monkeypatch.setattr(host.refusals, "watching", lambda args: args.watching)
    monkeypatch.setattr(host.batches, "most_prefill_rows", lambda runner: 8192)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return rows


def server(watching: tuple[str, ...] = (), found: bool = True, **more: Any) -> Any:
    return SimpleNamespace(
        server_args=SimpleNamespace(watching=[*watching], **more),
        model=({"a": object()} if found else {}, {"it turns half": ["b", "c"]}),
    )


def runtime(*, invariant: bool = False, **more: Any) -> Runtime:
    known = replace(recipe.load("bf16"), **more)
    return Runtime(known, select(known, Device("a GPU", (9, 0))), environment=Environment(invariant=invariant))


def test_servers_that_have_it_say_so(asked: list[int], caplog: pytest.LogCaptureFixture) -> None:
    run = runtime()
    assert "norm_rope" not in run.state()
    with caplog.at_level(logging.INFO):
        host.prepare_norm_rope(run, server(), CUDA)
    assert asked == [8192] and run.state()["norm_rope"] == FOUND.state()
    assert "SGLang's own kernels: it turns half (b, c)" in caplog.text and FOUND.describe() in caplog.text
    with caplog.at_level(logging.INFO):
        host.install_norm_rope(run, SimpleNamespace(token_to_kv_pool=SimpleNamespace()))
    assert run.norm_rope is None and "its cache is a SimpleNamespace" in caplog.text


def test_servers_that_do_not_have_it(
    asked: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode = runtime()
    decode.pair = Pair("decode", decode.recipe)
    with caplog.at_level(logging.INFO):
        for run, runner, device in (
            (runtime(), server(), torch.device("cpu")),
            (runtime(fuse=False), server(), CUDA),
            (decode, server(), CUDA),
            (runtime(), server(found=False), CUDA),
            (runtime(), server(enable_dp_attention=True), CUDA),
            (runtime(), server(("--forward-hooks",)), CUDA),
            (runtime(invariant=True), server(), CUDA),  # after load SGLang puts norms of other bits in place of its own
        ):
            host.prepare_norm_rope(run, runner, device)
            host.install_norm_rope(run, SimpleNamespace())
            assert run.norm_rope is None
    assert asked == []
    assert "own kernels: DP attention" in caplog.text and "own kernels: --forward-hooks sees all" in caplog.text
    assert "own kernels: inference is to be deterministic" in caplog.text

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(host, "prepare", no_memory)
    with caplog.at_level(logging.INFO):
        host.prepare_norm_rope(runtime(), server(), CUDA)
    assert "own kernels: too little memory" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [True, False], ids=["norms", "rope alone"])
@pytest.mark.parametrize("at_once", [True, False], ids=["written by RoPE", "written apart"])
def test_the_bits_of_sglangs_own_kernels(norm: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU that is here: Qwen3-8B's heads, with all tiles, and another size."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.models import utils

    from mixquant_sglang.kernels.triton.norm_rope import TILES

    execution = SimpleNamespace(
        deterministic=SimpleNamespace(rl_on_policy_target=None),
        graph=SimpleNamespace(cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(tc_compiler="eager"))),
    )
    monkeypatch.setattr(utils, "get_exec", lambda: execution)
    monkeypatch.setattr("sglang.srt.layers.rotary_embedding.base.get_exec", lambda: execution)
    for size, queries, keys in ((128, 32, 8), (128, 40, 4), (64, 14, 2), (256, 16, 2)):
        with CUDA:
            rope = RotaryEmbedding(size, size, 4096, 1000000, True, torch.bfloat16)
        norms = [
            SimpleNamespace(weight=(1 + torch.randn(size, device=CUDA)).bfloat16(), variance_epsilon=1e-6) for _ in "qk"
        ]
        heads = Heads(queries, keys, size, norm, at_once)
        attention = SimpleNamespace(q_norm=norms[0], k_norm=norms[1], head_dim=size, alt_stream=None, rotary_emb=rope)
        monkeypatch.setattr(norm_rope, "heads_of", lambda _attention, heads=heads: heads)
        sample = norm_rope.Sample(heads, 2048, CUDA)
        for tile in TILES:
            for rows in (1, 3, 65, 2048):
                assert norm_rope.same(attention, sample, rows, tile), (heads, rows, tile)
