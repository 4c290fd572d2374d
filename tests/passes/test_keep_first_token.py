"""keep_first_token: equal in double precision, its row exact, and no row for another token."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tests import zoo
from tests.exact import assert_untouched, check_exact, relative, snapshot, values_of
from tests.passes.test_quantize_layers import W8A8, observe
from tests.strategies import WIDTH as BUILT
from tests.strategies import GraphBuilder
from tests.toys import seeded
from tfmq_fx.capture import capture
from tfmq_fx.dialect import Stage, is_timestep_row, stage_of
from tfmq_fx.errors import ConfigError
from tfmq_fx.graph_json import from_json, to_json
from tfmq_fx.passes.keep_first_token import keep_first_token
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.sites import find_sites

WIDTH, TEXT, TOKENS, OUTLIER = 16, 12, 5, 50.0
TIMES = torch.arange(4)


class CrossAttention(nn.Module):
    """Tokens of the sample ask those of a text, which also joins them after a layer of its own."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(TEXT, WIDTH, bias=False)
        self.to_v = nn.Linear(TEXT, WIDTH)
        self.project = nn.Linear(TEXT, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)
        self.pooled = nn.Linear(TEXT, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t, text):
        h = x + self.time(t[:, None].to(x.dtype) / 10)[:, None]
        k, v = self.to_k(text), self.to_v(text)
        h = h + F.scaled_dot_product_attention(self.to_q(h), k, v)
        h = h + self.again(torch.tanh(self.project(text))).mean(1, keepdim=True)
        return self.out(h + self.pooled(text[:, -1])[:, None])


def graph_of(model, dtype=torch.float64, names=("x", "t", "text")):
    x, text = torch.randn(2, 4, WIDTH).to(dtype), torch.randn(2, TOKENS, TEXT).to(dtype)
    example = dict(zip(names, (x, torch.tensor([1, 2]), text), strict=True))
    return capture(model.to(dtype).eval(), example, timestep="t").gm


def token(scale=OUTLIER):
    return scale * torch.randn(TEXT, generator=torch.Generator().manual_seed(7))


def chunks(count=4, batch=6, tokens=TOKENS, dtype=torch.float64, first=None, seed=0):
    """Batches of samples whose text begins with the same token, some 50 times the others."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        text = torch.randn(batch, tokens, TEXT, generator=generator)
        text[:, 0] = token() if first is None else first
        x = torch.randn(batch, 4, WIDTH, generator=generator)
        yield x.to(dtype), torch.arange(batch) % 4, text.to(dtype)


KEPT = ["to_k", "to_v"]
REASSOCIATED = 1e-12  # sums of a dozen float64 products in another order, through a few layers


def largest_error(gm, done, values):
    """Of all values that the graphs have under one name."""
    before, after = values_of(gm, values), values_of(done, values)
    del before["output"], after["output"]
    return max(relative(after[name], value) for name, value in before.items())


def names_of(gm):
    return [site.name for site in find_sites(gm)[0]]


@pytest.fixture(scope="module")
def toy():
    return graph_of(seeded(CrossAttention))


def test_values_are_equal_whether_the_token_is_known_or_not(toy):
    earlier = snapshot(toy)
    done = keep_first_token(toy, chunks=chunks(), only=[*KEPT, "project"])
    assert done.changed == 3 and not done.declined and stage_of(done.gm) is Stage.CAPTURED
    assert_untouched(toy, earlier)
    check_exact(toy, done)  # another token in each sample
    for values in chunks(seed=1):
        assert largest_error(toy, done.gm, values) < REASSOCIATED


def test_the_layers_see_no_outlier_and_other_tokens_pass(toy):
    done = keep_first_token(toy, chunks=chunks(), only=KEPT).gm
    x, t, text = next(chunks(seed=1))
    text[2, 0] += 1e-9
    values = values_of(done, [x, t, text])
    call = next(n for n in done.graph.nodes if n.target == "to_k")
    seen = values[call.args[0].name]
    assert not seen[[0, 1, 3, 4, 5], 0].any() and torch.equal(seen[2], text[2])
    assert torch.equal(seen[:, 1:], text[:, 1:])
    name = next(n.name for n in toy.graph.nodes if n.target == "to_k")
    row = done.get_buffer("to_k_first_output")
    assert torch.equal(values[name][0, 0], row[0, 0])
    assert not torch.equal(values[name][2, 0], row[0, 0])
    assert torch.equal(done.get_buffer("to_k_first_token")[0, 0], text[0, 0])
    assert call.name != name and done.get_submodule("to_k") is toy.get_submodule("to_k")


def test_layers_on_one_value_share_what_is_done_to_it(toy):
    done = keep_first_token(toy, chunks=chunks(), only=[*KEPT, "project"])
    buffers = {n for n, _ in done.gm.named_buffers()}
    assert buffers == {
        "to_k_first_token",
        "to_k_first_output",
        "to_v_first_output",
        "project_first_output",
    }
    assert sum(n.target is torch.masked_fill for n in done.gm.graph.nodes) == 1
    peak, rest = done.details["peaks"]["to_v"]
    assert peak == pytest.approx(float(token().abs().max())) and rest < 6


def test_what_is_left_alone_says_why(toy):
    done = keep_first_token(toy, chunks=chunks(), only=names_of(toy))
    reasons = {d.site: d.reason for d in done.declined}
    assert done.changed == 3 and set(reasons) == {"time", "to_q", "again", "pooled", "out"}
    assert reasons["to_q"] == reasons["out"] == "its input is no condition of the request"
    assert reasons["again"] == "its input comes through project, which is quantized too"
    assert reasons["pooled"].endswith("is not (batch, tokens, channels)")

    def declined(data):
        done = keep_first_token(toy, chunks=data, only=KEPT)
        assert done.changed == 0 and done.gm.code == toy.code
        (reason,) = {d.reason for d in done.declined}
        return reason

    varying = [*chunks(2), *chunks(1, first=1.0)]
    assert declined(varying) == "its first token has 2 values in 18 samples"
    generator = torch.Generator().manual_seed(0)
    fresh = [*chunks(3, first=torch.randn(6, TEXT, generator=generator))]
    assert declined(fresh) == "its first token has 6 values in 18 samples"
    assert (
        declined(chunks(1, 1))
        == declined([])
        == ("it takes two samples to tell whether its first token varies")
    )
    assert declined(chunks(first=0.0)) == "its first token is 0, which is exact when quantized"
    with pytest.raises(ConfigError, match="no layer to_x in the graph"):
        keep_first_token(toy, chunks=chunks(), only=["to_x"])


def test_a_layer_of_a_condition_that_stays_in_float_may_come_before(toy):
    """tanh(project(text)) is the same at the first token of every sample of one batch size."""
    done = keep_first_token(toy, chunks=chunks(), only=["again"])
    assert done.changed == 1
    check_exact(toy, done)


def test_once_is_enough(toy):
    done = keep_first_token(toy, chunks=chunks(), only=KEPT)
    again = keep_first_token(done.gm, chunks=chunks(), only=KEPT)
    assert again.changed == 0 and again.gm.code == done.gm.code
    assert {d.reason for d in again.declined} == {
        "its first token is 0, which is exact when quantized"
    }


class Convolves(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.shared = nn.Conv1d(TEXT, WIDTH, 1), nn.Linear(TEXT, WIDTH)

    def forward(self, x, t, text, other):
        h = self.shared(text.float()) + self.shared(other.transpose(1, 2).transpose(1, 2))
        h = h + self.conv(text.float().transpose(1, 2)).transpose(1, 2)
        return x + h.mean(1, keepdim=True) * t[:, None, None]


def test_a_layer_called_twice_needs_one_token_for_both_calls():
    example = {
        "x": torch.randn(2, 4, WIDTH),
        "t": torch.tensor([1, 2]),
        "text": torch.randn(2, TOKENS, TEXT).half(),
        "other": torch.randn(2, TOKENS, TEXT),
    }
    gm = capture(seeded(Convolves).eval(), example, timestep="t").gm
    same = [(x, t, text.half(), text.half().float()) for x, t, text in chunks(dtype=torch.float32)]
    done = keep_first_token(gm, chunks=same, only=["shared", "conv"])
    assert done.changed == 1 and [d.reason for d in done.declined] == ["no linear layer"]
    assert sum(n.target is torch.masked_fill for n in done.gm.graph.nodes) == 2
    assert largest_error(gm, done.gm, same[0]) < 1e-5  # float32
    other = [(x, t, text, text.float() * 2) for x, t, text, _ in same]
    done = keep_first_token(gm, chunks=other, only=["shared"])
    assert [d.reason for d in done.declined] == ["its first token has 2 values in 48 samples"]


def test_a_text_that_is_written_in_place_is_read_when_its_layer_runs():
    b = GraphBuilder()
    text = b.placeholder("text", b.x.meta["val"].new_empty((b.batch, TOKENS, BUILT)))
    one = b.layer("one", nn.Linear(BUILT, 3), text)
    b.call("mul_", text, 2.0).meta["writes"] = True
    two = b.layer("two", nn.Linear(BUILT, 3), text)
    b.graph.output((one, two))
    gm = fx.GraphModule(b.root, b.graph, "Writes")
    gm.meta["timestep"] = "t"

    def values():
        return torch.zeros(2, BUILT), torch.tensor([0, 3]), torch.ones(2, TOKENS, BUILT)

    done = keep_first_token(gm, chunks=[values()], only=["one", "two"])
    assert done.changed == 2
    assert sum(n.target is torch.masked_fill for n in done.gm.graph.nodes) == 2
    for found, expected in zip(done.gm(*values()), gm(*values()), strict=True):
        assert relative(found, expected) < 1e-6  # float32


def test_a_text_of_one_token():
    model = seeded(CrossAttention).double().eval()
    text = torch.randn(2, 1, TEXT).double()
    example = {"x": torch.randn(2, 4, WIDTH).double(), "t": torch.tensor([1, 2]), "text": text}
    gm = capture(model, example, timestep="t").gm
    done = keep_first_token(gm, chunks=chunks(tokens=1), only=KEPT)
    assert done.changed == 2
    check_exact(gm, done)
    assert largest_error(gm, done.gm, next(chunks(1, tokens=1))) < REASSOCIATED
    ranges = observe(done.gm, list(chunks(tokens=1)), TIMES)
    assert not ranges["to_k"].high.any() and not ranges["to_k"].low.any()


def test_it_is_saved_and_loaded(toy):
    done = keep_first_token(toy, chunks=chunks(), only=KEPT).gm
    again = from_json(to_json(done))
    again.load_state_dict(done.state_dict(), strict=True, assign=True)
    values = next(chunks())
    assert torch.equal(again(*values)[0], done(*values)[0])


# ---------------------------------------------------------------------------- quantized


def quantized(gm, data, only):
    """The graph with the sites of `only` at 8 bits, observed on `data`."""
    plan = {name: W8A8 if name in only else type(W8A8)() for name in names_of(gm)}
    return quantize_layers(gm, plan=plan, ranges=observe(gm, data, TIMES), timesteps=TIMES).gm


def errors(gm, reference, data, names):
    """Relative squared error of the values of these names, first tokens and others apart."""
    error, power = (torch.zeros(len(names), 2).double() for _ in range(2))
    for values in data:
        true, found = values_of(reference, values), values_of(gm, values)
        for i, name in enumerate(names):
            for j, part in enumerate((slice(0, 1), slice(1, None))):
                error[i, j] += (found[name] - true[name])[:, part].double().square().sum()
                power[i, j] += true[name][:, part].double().square().sum()
    return dict(zip(names, (error / power).tolist(), strict=True))


def test_the_error_of_keys_falls_when_they_are_quantized():
    gm = graph_of(seeded(CrossAttention), torch.float32)
    data, held = list(chunks(dtype=torch.float32)), list(chunks(dtype=torch.float32, seed=5))
    nodes = {n.target: n.name for n in gm.graph.find_nodes(op="call_module")}
    kept = keep_first_token(gm, chunks=data, only=KEPT).gm
    before = errors(quantized(gm, data, KEPT), gm, held, [nodes[s] for s in KEPT])
    after = errors(quantized(kept, data, KEPT), gm, held, [nodes[s] for s in KEPT])
    for name, (first, rest) in after.items():
        # The range, and so the step of the grid, falls 30 fold (a peak of 100 against 3); weights
        # of 8 bits leave 1e-5 or so. One product of float32 rounds the row.
        assert rest < before[name][1] / 20 and first < 1e-12 < before[name][0]


def test_a_unet_of_diffusers_with_an_outlier_token():
    model = zoo.model("sd15")
    example = zoo.inputs("sd15", model)
    example["encoder_hidden_states"] = torch.randn(2, TOKENS, 32)
    gm = capture(model, example, timestep="timestep").gm
    order = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    generator = torch.Generator().manual_seed(0)
    bos = OUTLIER * torch.randn(32, generator=generator)

    def batches(count):
        for _ in range(count):
            text = torch.randn(4, TOKENS, 32, generator=generator)
            text[:, 0] = bos
            sample = torch.randn(4, *example["sample"].shape[1:], generator=generator)
            values = {"sample": sample, "timestep": TIMES, "encoder_hidden_states": text}
            yield [values[name] for name in order]

    data, held = list(batches(2)), list(batches(1))
    cross = [n for n in names_of(gm) if n.endswith(("attn2.to_k", "attn2.to_v"))]
    done = keep_first_token(gm, chunks=data, only=names_of(gm))
    assert done.changed == len(cross) >= 8 and set(done.details["peaks"]) == set(cross)
    assert {d.site for d in done.declined} == set(names_of(gm)) - set(cross)
    masks = [n for n in done.gm.graph.nodes if n.target is torch.masked_fill]
    assert len(masks) == 1  # for all layers of the one text
    first = next(n for n in done.gm.graph.nodes if n.op == "call_module")
    ready = list(done.gm.graph.nodes)[: list(done.gm.graph.nodes).index(first)]
    assert masks[0] in ready  # before any block that reads it
    nodes = {n.target: n.name for n in gm.graph.find_nodes(op="call_module")}
    keys = [nodes[name] for name in cross if name.endswith("to_k")]
    plain, kept = quantized(gm, data, cross), quantized(done.gm, data, cross)
    assert sum(is_timestep_row(n) for n in kept.graph.nodes) == 1  # ranges per timestep
    before, after = errors(plain, gm, held, keys), errors(kept, gm, held, keys)
    for name in keys:
        assert after[name][1] < before[name][1] / 20 and after[name][0] < 1e-10 < before[name][0]
