"State on disk, for anything that may be in it; bytes through any range; schedules within their bounds."
import math, tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from cxr_gan.core import to_bytes, to_float
from cxr_gan.training import Schedule, load_tree, save_tree

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)

@st.composite
def tensors(draw):
    "Any shape up to three sides, empty ones too, contiguous or not."
    shape = draw(st.lists(st.integers(0, 3), max_size=3)); x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    x = (100*x).to(draw(st.sampled_from(TYPES)))
    return x.t() if x.dim() == 2 and draw(st.booleans()) else x

plain = st.none() | st.booleans() | st.integers(-2**40, 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
trees = st.recursive(plain | tensors(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12)

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b

@settings(max_examples=60, deadline=None)
@given(tree=st.dictionaries(st.text(max_size=6), trees, max_size=5), cut=st.floats(0, .999))
def test_any_state_comes_back_and_a_cut_file_is_refused(tree, cut):
    with tempfile.TemporaryDirectory() as d:
        f = Path(d)/'state'; save_tree(tree, f, Path(d)/'old'); assert same(tree, load_tree(f)) and not (Path(d)/'old').exists()
        whole = f.read_bytes(); save_tree(dict(n=1), f, Path(d)/'old'); assert (Path(d)/'old').read_bytes() == whole
        f.write_bytes(whole[:int(cut*len(whole))])
        with pytest.raises(ValueError, match='damaged'): load_tree(f)

@settings(max_examples=50, deadline=None)
@given(lo=st.floats(-4, 4), width=st.floats(.1, 8))
def test_bytes_survive_any_range(lo, width):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16); y = to_float(x, (lo, lo+width))
    assert torch.equal(to_bytes(y, (lo, lo+width)), x) and math.isclose(float(y.min()), lo, abs_tol=1e-4) and math.isclose(float(y.max()), lo+width, abs_tol=1e-4)

@settings(max_examples=80, deadline=None)
@given(warmup=st.integers(0, 50), hold=st.integers(0, 50), decay=st.integers(0, 50), floor=st.floats(0, 1), step=st.integers(0, 200))
def test_a_schedule_stays_between_nothing_and_one(warmup, hold, decay, floor, step):
    s = Schedule(warmup, hold, decay, floor); v = s.factor(step)
    assert 0 <= v <= 1+1e-9
    if step >= max(warmup, hold+decay): assert math.isclose(v, floor if decay else 1., abs_tol=1e-9)

def test_fastais_tensorboard_takes_the_curves(tmp_path):
    event_file = pytest.importorskip('tensorboard.backend.event_processing.event_file_loader')
    from cxr_gan.cli import app
    from typer.testing import CliRunner
    r = CliRunner().invoke(app, ['train', 'lean', '--data', 'phantom:48', '--size', '16', '--width', '4', '--bs', '16', '--steps', '6', '--out', str(tmp_path/'run'), '--device', 'cpu', '--tensorboard'])
    assert r.exit_code == 0, r.output
    file, = (tmp_path/'run'/'tensorboard').iterdir()
    tags = [v.tag for e in event_file.EventFileLoader(str(file)).Load() for v in e.summary.value]
    assert tags.count('train_loss') == 6 and tags.count('d_loss') == 2 and {'lr_0', 'lr_1', 'g_grad', 'r1'} <= set(tags), 'each step, and the means of each epoch'

def run(steps=50, **kw):
    "Fifty steps without dropout: the same weights, films, labels and latents each time."
    from cxr_gan.data import phantom_set
    from cxr_gan.recipes import learner, recipe
    slow = dict(lr=1e-4, betas=(0., .99)) # a fast game amplifies what is rounded
    l = learner(recipe('modern', width=8, bs=16, amp=False, augment=None, d_opt=slow, g_opt=slow), phantom_set(96, 32), 32, device='cpu', **kw.pop('extra', {}))
    for k, v in kw.items(): setattr(l, k, v)
    with l.no_bar(), l.no_logging(): l.fit_for(steps=steps)
    return l.curves()

def test_half_precision_and_compiled_losses_stay_close_for_fifty_steps():
    plain = run()
    for kw, tol in ((dict(amp=torch.bfloat16), .02), (dict(extra=dict(compile={})), 1e-3)):
        other = run(**kw)
        for k in ('d_loss', 'g_loss'): off = abs(other[k]-plain[k]).max(); assert 0 < off < tol, (kw, k, off)
