"""watch: other weights of the source are refused by name; a source moved or gone is not missed."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.adapters import CHANGES, Denoiser, adapt, by_assigning, by_copy, by_data, low_rank
from tests.toys import seeded
from tfmq_fx import StaleError, check_source, compile, fold_timesteps, refresh, save
from tfmq_fx.serialization.fingerprints import Fingerprint
from tfmq_fx.serialization.staleness import StalenessCheck

NAME = "enter.weight"
X, T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 1])


@pytest.fixture
def source():
    return seeded(Denoiser).eval()


@pytest.fixture
def folded(source):
    return fold_timesteps(source, 3, (X, T))


def watching(model):
    tensors = dict(model.named_parameters())
    return StalenessCheck(model, {n: Fingerprint.of(t) for n, t in tensors.items()})


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("shift", torch.zeros(3))


# ---------------------------------------------------------------- other weights


COUNTED = [change for change in CHANGES if change is not by_data]  # by torch, or in another place


@pytest.mark.parametrize("change", COUNTED, ids=lambda change: change.__name__)
def test_changed_weights_are_refused_by_name(source, folded, change):
    folded(X, T)
    change(source, NAME)
    for _ in range(2):  # not only the first time
        with pytest.raises(StaleError, match=r"Denoiser .* has other weights since: enter\.we"):
            folded(X, T)


def test_up_to_five_names_and_what_to_do(source, folded):
    for name, _ in source.named_parameters():
        source.get_parameter(name).detach().add_(1)
    with pytest.raises(StaleError) as caught:
        folded(X, T)
    text = str(caught.value)
    assert "(8 in all)" in text and text.count(".weight") + text.count(".bias") == 5
    assert "tfmq_fx.refresh(model, source)" in text and "model.forget_source()" in text


def test_weights_put_back_are_fine(source, folded):
    before = source.get_parameter(NAME).detach().clone()
    by_copy(source, NAME)
    with pytest.raises(StaleError):
        folded(X, T)
    with torch.no_grad():
        source.get_parameter(NAME).copy_(before)
    folded(X, T)


def test_an_adapter_is_refused_fused_or_not(source, folded):
    (adapter,) = adapt(source, "enter")
    with pytest.raises(StaleError, match="has an adapter that is not fused into its weight"):
        folded(X, T)
    adapter.disable_adapters = True
    folded(X, T)
    adapter.disable_adapters = False
    adapter.merge()
    with pytest.raises(StaleError, match=r"has other weights since: enter\.weight\. Make"):
        folded(X, T)


def test_an_adapter_fused_into_a_layer_that_was_wrapped_before_is_refused(source):
    (adapter,) = adapt(source, "enter")
    watch = watching(source)
    watch.check()
    adapter.merge()
    with pytest.raises(StaleError, match=r"enter\.base_layer\.weight"):
        watch.check()


def test_an_adapter_fused_beside_another_is_refused(source):
    (adapter,) = adapt(source, "enter")
    adapter.merge()
    adapter.merged_adapters = ["one"]
    watch = watching(source)
    watch.check()
    adapter.merge()
    adapter.merged_adapters.append("other")  # as peft lists them
    with pytest.raises(StaleError, match=r"enter\.base_layer\.weight"):
        watch.check()


def in_a_corner(model, name):
    model.get_parameter(name).data.view(-1)[-1] += 1


@pytest.mark.parametrize("change", [by_data, in_a_corner], ids=lambda change: change.__name__)
def test_what_no_call_reads_is_read_where_it_matters(source, folded, change, tmp_path):
    """Written past the version counter: only reading all of it tells."""
    folded(X, T)
    change(source, NAME)
    folded(X, T)
    with pytest.raises(StaleError, match=r"enter\.weight"):
        save(folded, tmp_path / "model")
    with pytest.raises(StaleError, match=r"enter\.weight"):
        compile(folded, "eager")
    assert not (tmp_path / "model").exists()
    assert check_source(folded, source) == [NAME]
    assert torch.equal(refresh(folded, source)(X, T), fold_timesteps(source, 3, (X, T))(X, T))


def test_buffers_are_watched():
    model = Small()
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    watch = StalenessCheck(model, {n: Fingerprint.of(t) for n, t in held.items()})
    watch.check()
    model.shift += 1
    with pytest.raises(StaleError, match="since: shift"):
        watch.check()


def test_weights_changed_before_the_watch_began_are_noticed():
    model = Small()
    made = {name: Fingerprint.of(value) for name, value in model.named_parameters()}
    by_assigning(model, "linear.weight")
    watch = StalenessCheck(model, made)
    with pytest.raises(StaleError, match=r"since: linear\.weight"):
        watch.check()


# ---------------------------------------------------------------- no other weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_source_in_another_dtype_is_the_same(source, folded, dtype):
    expected = folded(X, T)
    source.to(dtype)
    assert torch.equal(folded(X, T), expected)
    by_copy(source, NAME)
    with pytest.raises(StaleError):
        folded(X, T)


def test_loading_the_same_weights_is_no_change(source, folded):
    state = {name: value.clone() for name, value in source.state_dict().items()}
    for assign in (False, True):
        source.load_state_dict(state, assign=assign)
        folded(X, T)
    source.load_state_dict(copy.deepcopy(state), assign=True)
    folded(X, T)
    by_copy(source, NAME)  # in the memory that it has now
    with pytest.raises(StaleError):
        folded(X, T)


def test_a_source_that_is_moved_away_or_deleted_is_no_change(source, folded):
    expected = folded(X, T)
    source.to("meta")
    assert torch.equal(folded(X, T), expected)
    del source
    gc.collect()
    assert torch.equal(folded(X, T), expected)


def test_weights_live_no_longer_than_their_model():
    model = Small()
    watch = watching(model)
    alive = weakref.ref(model.linear.weight)
    watch.check()
    del model
    gc.collect()
    watch.check()
    assert alive() is None


def test_memory_that_weights_leave_is_released_at_once():
    model = Small()
    watch = watching(model)
    watch.check()
    old = StorageWeakRef(model.linear.weight.untyped_storage())
    assert not old.expired()
    model.to(torch.float64)
    assert old.expired()
    watch.check()


def test_other_weights_in_the_memory_of_those_of_before_are_noticed():
    for _ in range(20):
        model = Small()
        watch = watching(model)
        watch.check()
        model.linear.weight.data = torch.empty(0)
        model.linear.weight.data = torch.randn(8, 8)  # often at the same address
        with pytest.raises(StaleError, match=r"linear\.weight"):
            watch.check()


def test_a_training_step_of_zero_and_gradients_are_no_change(source, folded):
    optimizer = torch.optim.SGD(source.parameters(), lr=0.0)
    source(X, T).sum().backward()
    optimizer.step()  # writes the same values: versions move
    folded(X, T)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    with pytest.raises(StaleError):
        folded(X, T)


def test_models_made_in_inference_mode_are_watched():
    with torch.inference_mode():
        model = Small()
        watch = watching(model)
        watch.check()
        model.linear.weight[4, 4] += 1  # such tensors count no writes
        watch.check()
        with pytest.raises(StaleError, match=r"linear\.weight"):
            watch.check_contents()
        model.linear.weight = nn.Parameter(torch.zeros(8, 8))
        with pytest.raises(StaleError, match=r"linear\.weight"):
            watch.check()


# ---------------------------------------------------------------- who watches


def test_copies_and_compiled_models_watch_too(source, folded):
    copied, compiled = copy.deepcopy(folded), compile(folded, "eager")
    again = copy.deepcopy(compiled)
    others = [copied, compiled, again]
    for model in others:
        model(X, T)
    by_copy(source, NAME)
    for model in others:
        with pytest.raises(StaleError):
            model(X, T)


def test_a_pickled_model_has_no_source(source, folded):
    expected = folded(X, T)
    loaded = pickle.loads(pickle.dumps(folded))
    by_data(source, NAME)
    assert loaded.watch is None and torch.equal(loaded(X, T), expected)


def test_two_sources_are_two(source):
    other = seeded(Denoiser, seed=1).eval()
    first, second = fold_timesteps(source, 3, (X, T)), fold_timesteps(other, 3, (X, T))
    by_copy(other, NAME)
    first(X, T)
    with pytest.raises(StaleError):
        second(X, T)


# ---------------------------------------------------------------- forgetting


def test_a_forgotten_source_may_change(source, folded):
    expected = folded(X, T)
    folded.forget_source()
    for name, _ in source.named_parameters():
        source.get_parameter(name).data += 1
    assert torch.equal(folded(X, T), expected)
    folded.forget_source()  # nothing left to forget


def test_memory_is_copied_only_where_it_is_shared(source, folded):
    shared = {p.data_ptr() for p in source.parameters()}
    before = folded.nbytes()
    assert any(t.data_ptr() in shared for t in folded.tensors())
    folded.forget_source()
    assert not any(t.data_ptr() in shared for t in folded.tensors())
    assert folded.nbytes() == before


def test_buffers_are_copied_as_well():
    class Shifted(Denoiser):
        """With a buffer of its own and one of a part."""

        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.ones(4))
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x, t):
            return self.norm(super().forward(x, t)) + self.shift

    source = seeded(Shifted).eval()
    folded = fold_timesteps(source, 3, (X, T))
    x, t = X[:1], T[:1]
    expected = folded(x, t)
    assert torch.equal(expected, source(x, t))
    folded.forget_source()
    source.shift += 1
    source.norm.running_mean += 1
    assert torch.equal(folded(x, t), expected)
    assert not torch.equal(source(x, t), expected)


def test_a_change_of_shared_memory_cannot_be_forgotten(source, folded):
    by_data(source, "leave.weight")
    with pytest.raises(StaleError, match=r"too late .* leave\.weight .* shares their memory"):
        folded.forget_source()
    with pytest.raises(StaleError):
        compile(folded, "eager")


def test_a_change_elsewhere_can_be_forgotten(source, folded):
    expected = folded(X, T)
    by_assigning(source, "leave.weight")  # new memory; the old is the model's alone
    by_copy(source, "time.0.weight")  # replaced by rows of a table
    with pytest.raises(StaleError):
        folded(X, T)
    folded.forget_source()
    assert torch.equal(folded(X, T), expected)


def test_low_rank_deltas_are_what_lora_makes_of_them():
    delta = low_rank((16, 8, 3, 3))
    assert torch.linalg.matrix_rank(delta.flatten(1)) == 2
