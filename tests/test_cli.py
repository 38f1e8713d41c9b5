"The command line as a user meets it: a run from films to numbers, going on after a stop, and what it says to bad input."
import errno, json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cxr_gan.architectures import LeanGenerator
from cxr_gan.cli import app
from cxr_gan.core import save_png
from cxr_gan.phantom import make_phantoms
from cxr_gan.recipes import RECIPES
from cxr_gan.training import load_network, save_network

def cxr(*args, ok=True):
    "Run a command in this process; returns what it printed, errors included."
    r = CliRunner().invoke(app, [str(a) for a in args])
    text = r.output
    assert (r.exit_code == 0) == ok, text
    if not ok: assert r.exit_code in (1, 2) and 'Traceback' not in text, text
    return text

TINY = ('--size', 16, '--width', 4, '--bs', 8, '--device', 'cpu')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Phantoms as PNG in train/test folders of three classes."
    root, p = tmp_path_factory.mktemp('films'), make_phantoms(36, 24, seed=3)
    for i, (x, y) in enumerate(zip(p.images, p.labels)): save_png(x, root/('train' if i < 24 else 'test')/('covid', 'normal', 'Viral Pneumonia')[y]/f'{i}.png')
    return root

@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'run'
    cxr('train', 'lean_max', '--data', folder, '--out', out, '--steps', 5, '--every', 3, *TINY)
    return out

def test_help_is_light():
    code = "import sys, cxr_gan.cli; sys.exit(bool({'torch', 'fastai', 'matplotlib', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
    for c in ('demo', 'data', 'train', 'generate', 'evaluate', 'recipes'): assert c in cxr('--help') and '--help' in cxr(c, '--help')

def test_a_run_is_a_whole_folder(run):
    assert {'run.json', 'checkpoint.safetensors', 'checkpoint_previous.safetensors', 'curves.png', 'data_card.txt', 'history.csv', 'progress.gif', 'generator', 'discriminator', 'health.json', 'samples'} == {p.name for p in run.iterdir()}
    plan = json.loads((run/'run.json').read_text())
    assert plan['films'] == {'covid': 8, 'normal': 8, 'Viral Pneumonia': 8} and plan['recipe']['name'] == 'lean_max' and set(plan['versions']) >= {'torch', 'fastai', 'cxr_gan'}
    assert [p.name for p in sorted((run/'samples').iterdir())] == ['step_0000000.png', 'step_0000003.png']

@pytest.mark.parametrize('name', RECIPES)
def test_each_recipe_trains_and_goes_on(name, folder, tmp_path):
    cxr('train', name, '--data', folder, '--out', tmp_path/'r', '--steps', 1, *TINY)
    assert 'going on from step 1' in cxr('train', name, '--out', tmp_path/'r', '--steps', 2, '--resume', '--device', 'cpu')
    assert json.loads((tmp_path/'r'/'generator'/'config.json').read_text())['steps'] == 2
    cxr('generate', tmp_path/'r', '--n', 2, '--out', tmp_path/'films', '--device', 'cpu')

def test_set_overrides_fields_one_by_one(folder, tmp_path):
    cxr('train', 'cs449', '--data', folder, '--out', tmp_path/'r', '--steps', 1, *TINY, '--set', 'd_opt.lr=1e-5', '--set', 'g_args.output="sigmoid"', '--set', 'd_args.output="sigmoid"', '--set', 'optimizer=rmsprop', '--set', 'augment.name=noise', '--set', 'augment.std=0.2', '--set', 'n_disc=1')
    r = json.loads((tmp_path/'r'/'run.json').read_text())['recipe']
    assert (r['d_opt'], r['g_args'], r['optimizer'], r['augment']) == (dict(lr=1e-5), dict(output='sigmoid'), 'rmsprop', dict(name='noise', std=.2))
    for change, says in (('batch=3', 'no field batch; it has name'), ('bs', 'expected field=value'), ('bs.x=3', 'has no keys'), ('terms.r9=1', "'r9' is not known"), ('optimizer=lion', 'known: adam'), ('g_args.depht=2', 'does not take depht')):
        assert says in cxr('train', 'cs449', '--data', folder, '--out', tmp_path/'bad', '--steps', 1, *TINY, '--set', change, ok=False) and not (tmp_path/'bad'/'run.json').exists(), change

def test_recipes_print_published_counts_beside_ours():
    rows = {r['name']: r for r in json.loads(cxr('recipes', '--json'))}
    assert rows['homework_keras']['published'] == {**rows['homework_keras']['counted'], 'counting': 'keras_no_embedding'} and rows['homework_keras']['counted']['generator'] == 24_045_504
    assert [n for n, r in rows.items() for k in ('generator', 'discriminator') if r['published'].get(k, r['counted'][k]) != r['counted'][k]] == []

def test_generate(run, tmp_path):
    cxr('generate', run, '--n', 7, '--out', tmp_path/'all', '--seed', 4)
    assert sorted(p.relative_to(tmp_path/'all').as_posix() for p in (tmp_path/'all').rglob('*.png')) == sorted(['contact_sheet.png', *[f'{c}/seed4_{i:05d}.png' for i, c in enumerate(['covid', 'normal', 'Viral Pneumonia']*3) if i < 7]])
    cxr('generate', run, '--n', 2, '--label', 'covid', '--out', tmp_path/'one', '--seed', 4)
    assert [p.parent.name for p in sorted((tmp_path/'one').rglob('seed*.png'))] == ['covid']*2
    assert Image.open(next((tmp_path/'one').rglob('seed*.png'))).size == (16, 16)
    assert 'expected' in cxr('generate', run, '--label', 'flu', '--out', tmp_path/'x', ok=False)
    assert 'at least one' in cxr('generate', run, '--n', 0, '--out', tmp_path/'x', ok=False)
    assert 'found no config.json' in cxr('generate', tmp_path, '--out', tmp_path/'x', ok=False)

def test_evaluate_a_run_and_a_folder(run, folder, tmp_path):
    text = cxr('evaluate', '--real', folder, '--fake', run, '--extractor', 'pixels', '--sets', 2, '--json', tmp_path/'s.json', '--device', 'cpu')
    rows = json.loads((tmp_path/'s.json').read_text())['scores']
    assert 'FD-pixels' in text and {r['metric'] for r in rows} >= {'FD-pixels', 'KID-pixels', 'precision', 'recall'}
    assert all((r['size'], r['sets'], r['n_real'], r['n_fake'], r['reference']) == (16, 2, 12, 12, 'test') and r['floor'] is not None for r in rows)
    cxr('generate', run, '--n', 12, '--out', tmp_path/'fakes'); (tmp_path/'fakes'/'contact_sheet.png').unlink()
    cxr('evaluate', '--real', folder, '--fake', tmp_path/'fakes', '--extractor', 'pixels', '--json', tmp_path/'f.json')
    assert all(r['sets'] == 1 and r['std'] is None for r in json.loads((tmp_path/'f.json').read_text())['scores'])
    assert 'no weight file' in cxr('evaluate', '--real', folder, '--fake', run, '--extractor', 'squeezenet1_0', '--weights', tmp_path/'no.pth', ok=False)
    assert 'is not known' in cxr('evaluate', '--real', folder, '--fake', run, '--extractor', 'squeezenet9', ok=False)

def test_snapshots_as_one_generator(folder, tmp_path):
    run, mixed = tmp_path/'run', tmp_path/'run'/'ensemble'
    cxr('train', 'lean', '--data', folder, '--out', run, '--steps', 5, '--snapshots', 2, *TINY)
    parts = sorted((run/'snapshots').iterdir()); assert [p.name for p in parts] == ['000002', '000004']
    cxr('ensemble', *parts, run, '--out', mixed); net, meta = load_network(mixed)
    assert (net.members, meta['steps'], meta['classes']) == (3, 5, ['covid', 'normal', 'Viral Pneumonia'])
    assert 'holds a generator already' in cxr('ensemble', *parts, '--out', mixed, ok=False)
    cxr('generate', mixed, '--n', 4, '--label', 'covid', '--out', tmp_path/'films', '--device', 'cpu'); assert len([*(tmp_path/'films'/'covid').iterdir()]) == 4
    assert 'FD-pixels' in cxr('evaluate', '--real', folder, '--fake', mixed, '--extractor', 'pixels', '--sets', 1)

def test_another_generator_and_wider_latents_in_the_place_of_the_runs_own(tmp_path):
    run, twin = tmp_path/'run', tmp_path/'twin'
    for seed, out in enumerate((run, twin)): cxr('train', 'lean_max', '--data', 'phantom:60', '--out', out, '--steps', 1, '--seed', seed, *TINY)
    cxr('ensemble', run, twin, '--out', tmp_path/'both')
    changes, out = ((), ('--generator', tmp_path/'both'), ('--truncation', 3)), tmp_path/'numbers.json'
    for command in (('report', run, '--extractor', 'pixels'), ('classify', run, '--epochs', 1, '--seed', 0, '--arm', 'generated')):
        found = [(cxr(*command, *c, '--json', out, '--device', 'cpu'), json.loads(out.read_text()))[1] for c in changes]
        assert [(f.pop('generator'), f.pop('truncation')) for f in found] == [(None, 1), (str(tmp_path/'both'), 1), (None, 3)]
        assert len({json.dumps(f) for f in found}) == 3, command[0]
    save_network(LeanGenerator(32, width=4), tmp_path/'other', classes=['a', 'b', 'c'])
    assert 'found a generator of 32 pixels, classes a, b, c, expected 16 pixels, classes' in cxr('report', run, '--generator', tmp_path/'other', ok=False)

def test_resume_equals_no_interruption(folder, tmp_path):
    a, b = tmp_path/'a', tmp_path/'b'
    common = ('train', 'lean_min', '--data', folder, *TINY)
    cxr(*common, '--out', a, '--steps', 7)
    cxr(*common, '--out', b, '--steps', 4); cxr(*common, '--out', b, '--steps', 7, '--resume')
    assert (a/'generator'/'model.safetensors').read_bytes() == (b/'generator'/'model.safetensors').read_bytes()
    assert 'holds a run already' in cxr(*common, '--out', b, '--steps', 9, ok=False)
    assert 'found no run to resume' in cxr(*common, '--out', tmp_path/'c', '--steps', 9, '--resume', ok=False)
    assert 'is a run of lean_min' in cxr('train', 'lean', '--out', b, '--steps', 9, '--resume', ok=False)
    whole = (b/'checkpoint.safetensors').read_bytes(); (b/'checkpoint.safetensors').write_bytes(whole[:len(whole)//2])
    assert 'going on from step 4' in cxr(*common, '--out', b, '--steps', 5, '--resume'), 'the checkpoint before it'
    for f in b.glob('checkpoint*'): f.write_bytes(whole[:99])
    assert 'is damaged' in cxr(*common, '--out', b, '--steps', 9, '--resume', ok=False)

def started(out, *more):
    "A training in a process of its own, with a checkpoint after every step."
    cmd = [sys.executable, '-c', 'from cxr_gan.cli import main; main()', 'train', 'lean_max', '--data', 'phantom:24', '--out', str(out), '--every', '1', *map(str, (*TINY, *more))]
    return subprocess.Popen(cmd, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

def stop(p, number, after, out):
    "Send a signal some seconds after there is a checkpoint; what the process said."
    for _ in range(900):
        if (out/'checkpoint.safetensors').exists() or p.poll() is not None: break
        time.sleep(.1)
    time.sleep(after); p.send_signal(number)
    return p.communicate()[1]

def weights(out): return (out/'generator'/'model.safetensors').read_bytes()

def test_asked_to_stop(tmp_path):
    out = tmp_path/'run'; p = started(out, '--steps', 100_000)
    said = stop(p, signal.SIGINT, .5, out)
    assert p.returncode == 0 and 'stopping after step' in said and weights(out)
    from cxr_gan.training import load_tree
    at = load_tree(out/'checkpoint.safetensors')['steps']; assert 0 < at < 100_000
    for where, more in ((out, ['--resume']), (tmp_path/'whole', [])): cxr('train', 'lean_max', '--data', 'phantom:24', '--out', where, '--steps', at+3, *TINY, *more)
    assert weights(out) == weights(tmp_path/'whole'), 'asked to stop and continued, or not stopped at all'

def test_killed_at_random_moments(tmp_path):
    kills, rng, out = int(os.environ.get('CXR_KILLS', 3)), random.Random(0), tmp_path/'run'
    for k in range(kills):
        stop(started(out, '--steps', 100_000, *(['--resume'] if (out/'run.json').exists() else [])), signal.SIGKILL, rng.uniform(0, 8), out)
        assert (out/'checkpoint.safetensors').exists() or (out/'checkpoint_previous.safetensors').exists(), k
    from cxr_gan.training import load_tree
    at = max(load_tree(f)['steps'] for f in out.glob('checkpoint*')); assert at > 0
    for where, more in ((out, ['--resume']), (tmp_path/'whole', [])): cxr('train', 'lean_max', '--data', 'phantom:24', '--out', where, '--steps', at+3, *TINY, *more)
    assert weights(out) == weights(tmp_path/'whole') and not [*out.glob('.checkpoint*')]

def test_two_processes(tmp_path):
    def together(out, *more):
        cmd = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--no-python', str(Path(sys.executable).parent/'cxr-gan')]
        r = subprocess.run([*cmd, 'train', 'lean_max', '--data', 'phantom:48', '--out', str(out), *map(str, (*TINY, *more))], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        assert r.returncode == 0, r.stderr[-3000:]
        return r.stderr
    said = together(tmp_path/'a', '--steps', 7); assert said.count('7 steps; the run is in') == 1, 'one of them speaks'
    together(tmp_path/'b', '--steps', 4); together(tmp_path/'b', '--steps', 7, '--resume'); assert weights(tmp_path/'a') == weights(tmp_path/'b')
    assert 'of processes' in cxr('train', 'lean_max', '--out', tmp_path/'b', '--steps', 9, '--resume', *TINY, ok=False), 'another number of processes is refused'
    together(tmp_path/'c', '--minutes', .05); assert (tmp_path/'c'/'health.json').exists(), 'a clock stops both'

@pytest.mark.parametrize('args, says', [
    (('train', 'cgann', '--steps', 1), 'known: lean'),
    (('train', 'cgan_max', '--steps', 1, '--passes', 0, '--size', 16, '--width', 2, '--data', 'phantom:64'), 'at least one pass'),
    (('train', 'cgan', '--steps', 1, '--passes', 2), 'found cgan'),
    (('train', 'lean'), 'give --epochs, --steps or --minutes'),
    (('train', 'lean', '--steps', 1, '--size', 48), 'power of two'),
    (('train', 'lean', '--steps', 1, '--data', 'phantom:none'), 'phantom:N'),
    (('train', 'lean', '--steps', 1, '--data', 'phantom:9', '--size', 16, '--bs', 32), 'expected at least one batch of 32'),
    (('train', 'lean', '--steps', 1, '--data', '/no/such/folder'), 'no such folder'),
    (('train', 'lean', '--steps', 1, '--data', 'phantom:24', '--class', 'flu', '--size', 16), 'flu'),
    (('train', 'lean', '--steps', 1, '--data', 'phantom:48', '--size', 16, '--device', 'toaster'), "try 'cpu'")])
def test_bad_input_is_a_sentence(args, says, tmp_path):
    assert says in cxr(*args, '--out', tmp_path/'r', ok=False)
    assert not (tmp_path/'r'/'generator').exists()

def test_empty_folder(tmp_path):
    (tmp_path/'empty').mkdir(); assert 'found no films' in cxr('data', tmp_path/'empty', ok=False)

def test_unwritable_and_full(run, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('x')
    assert 'choose another folder' in cxr('generate', run, '--n', 2, '--out', tmp_path/'file'/'sub', ok=False)
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))
    monkeypatch.setattr(os, 'fsync', full)
    assert 'No space left' in cxr('generate', run, '--n', 2, '--out', tmp_path/'full', ok=False)
    assert not [p for p in (tmp_path/'full').rglob('*') if p.is_file()], 'nothing half-written is left'
    before = (run/'checkpoint.safetensors').read_bytes()
    assert 'No space left' in cxr('train', 'lean_max', '--out', run, '--steps', 9, '--resume', *TINY, ok=False)
    assert (run/'checkpoint.safetensors').read_bytes() == before, 'the last good checkpoint is whole'

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='the superuser may write anywhere')
def test_read_only_folder(run, tmp_path):
    (tmp_path/'ro').mkdir(); (tmp_path/'ro').chmod(0o555)
    assert 'choose another folder' in cxr('generate', run, '--n', 2, '--out', tmp_path/'ro'/'x', ok=False)

def test_recipes_and_data(folder):
    rows = {r['name']: r for r in json.loads(cxr('recipes', '--json'))}
    assert (rows['cgan']['generator_trainable'], rows['cgan']['discriminator_trainable'], rows['cgan']['generator_total']) == (4_786_747, 5_613_463, 4_819_515)
    assert rows['cgan_max']['uncertainty'] == dict(mode='max', alpha=1.) and 'd_opt' in rows['dcgan'] and 'cgan_min' in cxr('recipes')
    card = cxr('data', folder); assert 'Viral Pneumonia' in card and '36' in card

def test_unconditional_run(tmp_path):
    cxr('train', 'dcgan', '--data', 'phantom:24', '--out', tmp_path/'r', '--steps', 2, *TINY)
    cxr('generate', tmp_path/'r', '--n', 3, '--out', tmp_path/'g'); assert len(list((tmp_path/'g'/'films').glob('*.png'))) == 3
    assert 'unconditional' in cxr('generate', tmp_path/'r', '--label', '0', '--out', tmp_path/'g2', ok=False)
    cxr('evaluate', '--real', 'phantom:24', '--fake', tmp_path/'r', '--extractor', 'pixels', '--sets', 2)

@pytest.mark.parametrize('data', ['phantom:48', 'folder'])
def test_demo(data, folder, tmp_path):
    cxr('demo', '--data', folder if data == 'folder' else data, '--size', 16, '--steps', 4, '--width', 4, '--epochs', 1, '--out', tmp_path/'demo', '--device', 'cpu', *(() if data != 'folder' else ('--bs', 8)))
    page, numbers = (tmp_path/'demo'/'index.html').read_text(), json.loads((tmp_path/'demo'/'demo.json').read_text())
    assert page.count('data:image/png;base64,') == 6 and 'precision' in page and '<h2>Films</h2>' in page and '<h2>t-SNE</h2>' in page
    assert {r['arm'] for r in numbers['classifiers']['lean_max']} == {'real', 'half', 'generated'} and all(r['floor'] is not None for r in numbers['scores']['lean'])
