"""What does not read as a lesson: whole runs of torch-fidelity, 2048 dimensions, hostile files, other processes."""
import os, pickle, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch.testing import assert_close
from cxr_gan import metrics as M
from cxr_gan.core import rng
from cxr_gan.data import phantom_set

def cloud(n, d, seed=0):
    "Like the features of a network: float32, not negative, correlated, variances over four orders of magnitude."
    mix = torch.randn(d, d, generator=rng(0))/d**.5*torch.logspace(0, -2, d)
    return ((torch.randn(n, d, generator=rng(seed+1))@mix)*(1+.1*seed)).abs()+.01*seed

@pytest.fixture(scope='module')
def inception_file(tmp_path_factory):
    import io
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, state): pass
    torch.save({}, empty := io.BytesIO()); empty.seek(0); torch.manual_seed(0)
    torch.save(Random('r', ['2048'], feature_extractor_weights_path=empty).state_dict(), f := tmp_path_factory.mktemp('w')/'inception.pth')
    return f

# ---- values

@pytest.mark.parametrize('n,m,d', [(60, 90, 2048), (200, 200, 64), (64, 65, 64), (65, 66, 64), (40, 500, 64)])
def test_distances_equal_torch_fidelity(n, m, d):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    a, b = cloud(n, d), cloud(m, d, 1)
    fid = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    np.testing.assert_allclose(M.frechet_distance(a, b), fid['frechet_inception_distance'], rtol=1e-3)
    kid = kid_features_to_metric(a, b, kid_subsets=10, kid_subset_size=30, verbose=False)
    np.testing.assert_allclose(M.kernel_distance(a, b, 10, 30), list(kid.values()), rtol=1e-3)
    prc = prc_features_to_metric(b, a, verbose=False)
    np.testing.assert_allclose(M.precision_recall(a, b), (prc['precision'], prc['recall']), atol=1.5/min(n, m))

def test_whole_run_of_torch_fidelity_on_the_same_films(inception_file):
    import torch_fidelity
    class Films(torch.utils.data.Dataset):
        def __init__(self, x): self.x = x.expand(-1, 3, -1, -1)
        def __len__(self): return len(self.x)
        def __getitem__(self, i): return self.x[i]
    real, fake = phantom_set(8, 64, seed=0).images, phantom_set(6, 64, seed=1).images
    theirs = torch_fidelity.calculate_metrics(input1=Films(fake), input2=Films(real), cuda=False, fid=True, kid=True, isc=True, isc_splits=1, kid_subset_size=4, kid_subsets=5,
        feature_extractor_weights_path=str(inception_file), verbose=False, save_cpu_ram=True, batch_size=8, cache=False)
    ex = M.inception_extractor(inception_file, device='cpu')
    r, f = ex(real), ex(fake)
    np.testing.assert_allclose(M.frechet_distance(r, f), theirs['frechet_inception_distance'], rtol=1e-3)
    np.testing.assert_allclose(M.kernel_distance(f, r, 5, 4)[0], theirs['kernel_inception_distance_mean'], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(M.inception_score(ex.probs(f))[0], theirs['inception_score_mean'], rtol=1e-3)
    rows = M.evaluate_images(fake, phantom_set(8, 64, seed=0), phantom_set(12, 64, seed=2), ex)
    assert [s.metric for s in rows] == ['FID', 'KID', 'precision', 'recall', 'inception score']
    np.testing.assert_allclose(rows[0].value, theirs['frechet_inception_distance'], rtol=1e-3)

def test_the_error_of_both_forms_stays_small_at_2048_dimensions():
    x = cloud(120, 2048)
    size = float(x.double().square().sum(1).mean())
    assert M.frechet_distance(x, x) < 1e-6*size
    v = torch.linspace(-1, 1, 2048)
    np.testing.assert_allclose(M.frechet_distance(x, x.double()+v), float(v.double()@v.double()), rtol=1e-6)

floats = st.floats(-100, 100, width=32)
@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(5, 12), st.just(4)), elements=floats), arrays(np.float32, st.tuples(st.integers(5, 12), st.just(4)), elements=floats), st.randoms(use_true_random=False))
def test_laws_hold_for_any_features(a, b, r):
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    scale = 1e-5*float(1+a.double().square().sum(1).mean()+b.double().square().sum(1).mean())
    fd = M.frechet_distance(a, b)
    assert fd >= 0 and M.frechet_distance(a, a) < scale and M.frechet_distance(b, b) < scale
    assert abs(fd-M.frechet_distance(b, a)) < scale
    order = list(range(len(a))); r.shuffle(order)
    assert abs(fd-M.frechet_distance(a[order], b)) < scale
    p, q = M.precision_recall(a, b); assert (q, p) == M.precision_recall(b, a) and 0 <= min(p, q) <= max(p, q) <= 1
    assert M.precision_recall(a, a[order]) == (1, 1)

def test_features_that_never_change():
    still = torch.ones(30, 6)
    assert M.frechet_distance(still, still) == 0
    np.testing.assert_allclose(M.frechet_distance(still, still*3), 24, rtol=1e-9)
    np.testing.assert_allclose(M.frechet_distance(cloud(30, 6), still), float((cloud(30, 6).mean(0)-1).double().square().sum()+cloud(30, 6).double().var(0).sum()), rtol=1e-5)

# ---- extractors

@pytest.mark.parametrize('name,d,size', [('resnet18', 512, 32), ('densenet121', 1024, 32), ('mobilenet_v2', 1280, 32), ('shufflenet_v2_x0_5', 1024, 32), ('googlenet', 1024, 32), ('regnet_y_400mf', 440, 32),
    ('swin_t', 768, 64), ('efficientnet_b0', 1280, 32), ('mnasnet0_5', 1280, 32), ('squeezenet1_1', 512, 32), ('convnext_tiny', 768, 32)])
def test_features_of_many_torchvision_networks(name, d, size):
    body = M._pooled(M._build(name).eval())
    with torch.no_grad(): f = body(torch.randn(2, 3, size, size, generator=rng(0)))
    assert f.shape == (2, d) and torch.isfinite(f).all()

def test_a_weight_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)
    bad = tmp_path/'evil.pth'; bad.write_bytes(pickle.dumps({'x': Evil()})); torch.save({'x': Evil()}, tmp_path/'evil2.pth')
    for f in (bad, tmp_path/'evil2.pth'):
        for load in (M.inception_extractor, lambda w: M.network_extractor('squeezenet1_0', w)):
            with pytest.raises(ValueError, match='not a file of tensors'): load(f)
    assert not (tmp_path/'ran').exists()

def test_without_file_and_network_the_error_says_which_file(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    def no_network(*a, **k): raise OSError('no route to host')
    monkeypatch.setattr(M, 'urlopen', no_network)
    for name, file in [('inception', 'weights-inception-2015-12-05-6726825d.pth'), ('squeezenet1_0', 'squeezenet1_0-b66bff10.pth'), ('resnet18', 'resnet18-f37072fd.pth')]:
        with pytest.raises(FileNotFoundError, match=f'needs the file {file}.*--weights FILE'): M.make_extractor(name)
    with pytest.raises(FileNotFoundError, match='no weight file'): M.make_extractor('inception', tmp_path/'none.pth')

def test_weights_of_another_shape_are_refused(tmp_path):
    net = M._build('squeezenet1_0'); state = net.state_dict(); state['classifier.1.bias'] = torch.zeros(3); torch.save(state, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='0 keys missing, 0 unknown, 1 of another shape'): M.network_extractor('squeezenet1_0', tmp_path/'w.pth')

def test_importing_the_chapter_is_light():
    code = "import sys, cxr_gan.metrics; print([m for m in ('fastai', 'torchvision', 'torch_fidelity') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_same_features_in_another_process():
    code = "import torch; from cxr_gan.metrics import *; from cxr_gan.data import phantom_set; s = phantom_set(24, 32); print(domain_extractor(s, epochs=1, width=4, device='cpu')(s.images).double().sum().item())"
    once, twice = (subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}).stdout for _ in range(2))
    assert once == twice and float(once) != 0

# ---- protocol

def test_colour_films_and_sets_of_unlike_size():
    rgb = phantom_set(30, 32, seed=0)
    rgb.images = rgb.images.expand(-1, 3, -1, -1)
    other = phantom_set(45, 32, seed=1); other.images = other.images.expand(-1, 3, -1, -1)
    rows = M.evaluate_images(phantom_set(20, 32, seed=2).images.expand(-1, 3, -1, -1), rgb, other, M.pixels_extractor(8, device='cpu'))
    assert all((s.d, s.n_real, s.n_fake) == (192, 30, 20) and s.floor is not None for s in rows)
    assert 'precision' in M.table(rows)

def test_seeds_repeat_and_the_callers_stream_stays():
    ref, train, ex = phantom_set(30, 32, seed=0), phantom_set(60, 32, seed=1), M.pixels_extractor(8, device='cpu')
    make = lambda n, y, seed: (255*torch.rand(n, 1, 32, 32, generator=rng(seed))).to(torch.uint8)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b, c = (M.evaluate_images(make, ref, train, ex, latent_sets=2, seed=s) for s in (0, 0, 9))
    assert a == b and a != c
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()

def test_nan_features_are_refused_by_name_of_the_cause():
    ref = phantom_set(12, 32)
    with pytest.raises(ValueError, match='NaN or infinity in 12 of 12 rows'): M.evaluate_images(ref.images[:9], ref, None, M.Extractor('bad', lambda x: x.float().mean((2, 3))/0*0, device='cpu'))

# ---- real weights and films, when the environment names them

@pytest.mark.skipif(not os.environ.get('CXR_SQUEEZENET'), reason='CXR_SQUEEZENET names no weight file')
def test_real_squeezenet_sees_noise():
    ex = M.network_extractor('squeezenet1_0', os.environ['CXR_SQUEEZENET'])
    a, b = phantom_set(100, 64, seed=0).images, phantom_set(100, 64, seed=1).images
    noisy = (b+16*torch.randn(b.shape, generator=rng(0))).clamp(0, 255).to(torch.uint8)
    assert 3*M.frechet_distance(ex(a), ex(b)) < M.frechet_distance(ex(a), ex(noisy))
