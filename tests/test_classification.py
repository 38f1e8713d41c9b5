"Laws of the mixed loader on random settings, and the new last layer on every network of torchvision."
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from cxr_gan.architectures import count_parameters
from cxr_gan.classification import MixedLoader, make_classifier
from cxr_gan.core import rng
from cxr_gan.data import ImageSet, ResidentLoader
from cxr_gan.metrics import network_names

def films(n, lo, seed): return ImageSet(torch.randint(lo, lo+100, (n, 1, 4, 4), generator=rng(seed)).to(torch.uint8), torch.arange(n) % 3, list('abc'))
def fresh(n, labels, seed): return torch.randint(150, 250, (n, 1, 4, 4), generator=rng(seed)).to(torch.uint8), labels

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), bs=st.integers(1, 17), share=st.sampled_from([0., .25, .5, 1.]), pool=st.booleans(), seed=st.integers(0, 9))
def test_as_many_steps_and_films_as_real_alone(n, bs, share, pool, seed):
    real, made = films(n, 0, 0), films(40, 150, 1) if pool else fresh
    dl, plain = MixedLoader(real, made, bs, share, device='cpu', seed=seed), ResidentLoader(real, bs, device='cpu', seed=seed)
    for _ in range(2):
        got, want = list(dl), list(plain)
        assert len(dl) == len(got) == len(want) and [len(y) for _, y in got] == [len(y) for _, y in want]
        for x, y in got:
            assert int((x[:, 0, 0, 0] > 0).sum()) == int(len(y)*share) and len(x) == len(y)

@settings(max_examples=40, deadline=None)
@given(stop=st.integers(0, 11), mixing=st.sampled_from(['exact', 'shuffled']), pool=st.booleans())
def test_goes_on_where_it_stopped(stop, mixing, pool):
    real, made = films(30, 0, 0), films(20, 150, 1) if pool else fresh
    new = lambda: MixedLoader(real, made, 8, mixing=mixing, device='cpu', seed=4)
    def run(dl, k):
        out = []
        while len(out) < k:
            for b in dl:
                out.append(b)
                if len(out) == k: break
        return out
    whole, first, second = run(new(), 12), new(), new()
    head = run(first, stop) if stop else []
    second.load_state_dict(first.state_dict())
    tail = run(second, 12-stop)
    for a, b in zip(whole, head+tail): assert_close(a[0], b[0]); assert_close(a[1], b[1])

@pytest.mark.parametrize('name', network_names())
def test_every_network_gets_a_new_last_layer(name):
    try:
        with torch.device('meta'): net, frozen = make_classifier(name, 7), make_classifier(name, 7, frozen=True)
    except NotImplementedError: pytest.skip('cannot be built without memory')
    last = [m for m in net.net.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    assert last.weight.shape[0] == 7 and not any(p.shape[:1] == (1000,) and p.dim() == 2 for p in net.parameters())
    assert 0 < count_parameters(frozen) == sum(p.numel() for p in last.parameters()) < count_parameters(net)
