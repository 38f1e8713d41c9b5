"What the package promises before any of it is used: light imports, each fact in one place, nothing of one machine."
import importlib.metadata, importlib.util, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import check_notebooks, readme

SETTINGS = check_notebooks.settings(ROOT)
HEAVY = ('torch', 'torchvision', 'fastai', 'matplotlib', 'sklearn', 'scipy')

def files():
    "What git tracks or would track; every file where there is no git."
    git = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0 and git.stdout: return [p for p in map(ROOT.joinpath, git.stdout.splitlines()) if p.is_file()]
    return [p for p in ROOT.rglob('*') if p.is_file() and not any(s.startswith('.venv') or s in ('.git', '__pycache__') for s in p.parts)]

def text_of(path):
    "What a file says, pictures in notebooks left out."
    if path.suffix == '.ipynb':
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        return '\n'.join(''.join(c['source'])+'\n'.join(map(check_notebooks.output_text, c.get('outputs', []))) for c in cells)
    try: return path.read_text(encoding='utf-8')
    except UnicodeDecodeError: return ''

@pytest.mark.parametrize('module, heavy', [('cxr_gan', HEAVY), ('cxr_gan.cli', HEAVY),
    *((f'cxr_gan.{m}', ('torch._dynamo',)) for m in ('training', 'recipes', 'health'))]) # the compiler: half the time of a start
def test_a_light_import(module, heavy):
    code = f'import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''

def test_one_version():
    import cxr_gan
    assert cxr_gan.__version__ == SETTINGS['version'] == importlib.metadata.version('cxr_gan')
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert 'version' not in citation and 'date-released' not in citation, 'settings.ini holds the version'
    assert citation['license'] == 'Apache-2.0' and citation['cff-version'] == '1.2.0' and {'message', 'title', 'authors'} <= set(citation)

def test_one_list_of_requirements():
    listed = {k: [Requirement(r) for r in v.split()] for k, v in SETTINGS.items() if k == 'requirements' or k.endswith('_requirements')}
    assert all(listed.values())
    names = [r.name for rs in listed.values() for r in rs]
    assert len(set(names)) == len(names), 'a requirement is written once'
    built = [Requirement(r) for r in importlib.metadata.requires('cxr_gan')]
    assert {(r.name, str(r.specifier)) for r in built if not r.marker} == {(r.name, str(r.specifier)) for r in listed['requirements']}
    assert {r.name for r in built} == set(names)
    assert 'requirements' not in (ROOT/'pyproject.toml').read_text(encoding='utf-8').replace('requires', ''), 'pyproject.toml lists none'

def test_one_list_of_pythons():
    oldest = SETTINGS['min_python']
    meta = importlib.metadata.metadata('cxr_gan')
    claimed = [c.split(' :: ')[-1] for c in meta.get_all('Classifier') if c.startswith('Programming Language :: Python :: 3.')]
    jobs = yaml.safe_load((ROOT/'.github/workflows/test.yml').read_text(encoding='utf-8'))['jobs']
    assert claimed == jobs['tests']['strategy']['matrix']['python'] and claimed[0] == oldest == '.'.join(map(str, check_notebooks.PYTHON))
    assert meta['Requires-Python'] == f'>={oldest}'

def test_the_two_commands():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    demo, tests = readme.command('demo', text), readme.command('tests', text)
    assert re.search(r'cxr-gan demo\b', demo) and 'tools/run_tests.py' in tests
    assert all(c.startswith('python3 -m venv ') for c in (demo, tests)), 'they need nothing but Python'
    ci = (ROOT/'.ci/run').read_text(encoding='utf-8')
    assert 'readme demo' in ci and 'readme tests' in ci and 'readme.py --command tests' in (ROOT/'.github/workflows/test.yml').read_text(encoding='utf-8')

@pytest.mark.parametrize('name', ['test', 'docs', 'release'])
def test_a_workflow(name):
    flow = yaml.safe_load((ROOT/f'.github/workflows/{name}.yml').read_text(encoding='utf-8'))
    assert flow['permissions'] and True in flow, 'yaml reads the key `on` as true'
    steps = [s for j in flow['jobs'].values() for s in j.get('steps', [])]
    for s in steps: assert ('run' in s) != ('uses' in s)
    for s in steps: assert 'uses' not in s or re.search(r'@(v\d+|release/v\d+)$', s['uses']), 'actions are pinned to a major version'

def test_nothing_of_one_machine():
    pattern = re.compile(r'(?<![\w./:}~-])/(home|root|work|Users)/\w')
    found = [f'{p.relative_to(ROOT)}: {m[0]}' for p in files() if (m := pattern.search(text_of(p)))]
    assert not found, found

def test_no_merge_marks_and_no_large_files():
    for p in files():
        assert not re.search(r'^(<{7}|>{7}) ', text_of(p), re.M), p
        assert p.stat().st_size < 3_000_000, f'{p} is {p.stat().st_size/1e6:.1f} MB'

def test_the_source_archive_holds_what_its_build_reads():
    listed = (ROOT/'MANIFEST.in').read_text(encoding='utf-8').split()
    for name in ['settings.ini', 'README.md', 'LICENSE', 'CITATION.cff', 'DATA_CARD.md', 'MODEL_CARD.md', 'CHANGELOG.md', 'CONTRIBUTING.md']:
        assert name in listed and (ROOT/name).exists(), name
    assert 'END OF TERMS AND CONDITIONS' in (ROOT/'LICENSE').read_text(encoding='utf-8')

def test_the_smoke_test_passes_here(tmp_path):
    subprocess.run([sys.executable, str(ROOT/'tests/smoke.py')], cwd=tmp_path, check=True, capture_output=True)
