"Each fault that tools/check_notebooks.py is there to find, made on purpose; and what tools/readme.py makes of a notebook."
import json, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import check_notebooks as cn
import readme

TITLE = ('markdown', '# Core\n\n> One line')
ADD = '#| export\ndef add(a, b):\n    "The sum."\n    return a+b'

def cell(kind, source, cell_id='abc', outputs=()):
    c = dict(cell_type=kind, metadata={}, source=source.splitlines(keepends=True))
    if cell_id: c['id'] = cell_id
    if kind == 'code': c.update(execution_count=None, outputs=list(outputs))
    return c

def notebook(*cells):
    "Cells given as (kind, source) or as dicts; ids a0, a1, ..."
    return dict(cells=[c if isinstance(c, dict) else cell(*c, f'a{i}') for i, c in enumerate(cells)], metadata={}, nbformat=4, nbformat_minor=5)

def chapter(*more, module='core'): return notebook(TITLE, ('code', f'#| default_exp {module}'), ('code', ADD), *more)

def project(root, books, modules=None):
    "A small project: notebooks by file name, and the modules in its package."
    (root/'nbs').mkdir(); (root/'cxr_gan').mkdir()
    (root/'settings.ini').write_text('[DEFAULT]\ntst_flags = slow cuda\n')
    for name, nb in books.items(): (root/'nbs'/name).write_text(nb if isinstance(nb, str) else json.dumps(nb, indent=1))
    for m in ['core'] if modules is None else modules: (root/f'cxr_gan/{m}.py').write_text('x = 1\n')
    return root

def stream(text): return dict(output_type='stream', name='stdout', text=[text])

def lesson(source='1', outputs=()): return chapter(cell('code', source, 'here', outputs))

def test_a_clean_project_passes(tmp_path):
    second = notebook(TITLE, ('code', '#| default_exp data'), ('code', '#| export\nfrom cxr_gan.core import add'), ('code', '#| hide\nimport math'),
        ('code', '# what comes of it\nadd(1, 2) # one | two'), ('code', '#| slow\nadd(2, 2)'), ('code', '#| echo: false\n"#| not a directive"'),
        cell('code', 'from math import pi\nassert pi > 3', 'free', [stream('epoch 3 of 4, 299x299, 10:4\n')]))
    assert cn.find_faults(project(tmp_path, {'00_core.ipynb': chapter(), '02_data.ipynb': second, '_draft.ipynb': 'no notebook'}, ['core', 'data', '_modidx', '__init__'])) == []

FAULTS = {
    'below a comment': (lesson('# first a word\n#| export\nx = 1'), ['here, line 2', 'move it to the top']),
    'no bar': (lesson('# export\nx = 1'), ['here, line 1', 'plain comment']),
    'two hashes': (lesson('##| export\nx = 1'), ['here', 'plain comment']),
    'a typo': (lesson('#| exprot\nx = 1'), ['here', 'unknown directive `#| exprot`']),
    'a misspelt flag': (lesson('#| slwo\nx = 1'), ['unknown directive `#| slwo`', 'slow']),
    'no colon': (lesson('#| echo false\nx = 1'), ['needs a colon']),
    'export elsewhere': (lesson('#| export data\nx = 1'), ['writes into another module']),
    'no id': (chapter(cell('code', '1', None)), ['cell number 3: has no id']),
    'one id twice': (chapter(('code', '1'), cell('code', '2', 'a3')), ['cell a3: 2 cells share this id']),
    'no module': (notebook(TITLE, ('code', ADD)), ['exports without `#| default_exp`', 'cxr_gan/core.py: no notebook writes']),
    'two modules': (chapter(('code', '#| default_exp data')), ['2 cells with `#| default_exp`']),
    'nothing exported': (notebook(TITLE, ('code', '#| default_exp core')), ['exports no cell']),
    'a magic': (lesson('#| export\n%matplotlib inline\nx = 1'), ['here', '`%matplotlib inline` is no Python']),
    'a twin': (lesson('#| export\ndef _add(a): return a\ndef _add(a): return 2*a'), ['here: `_add` is defined in cell here already']),
    'a shell': (lesson('#| export\nfiles = !ls'), ['here', '!l']),
    'new syntax': (lesson('#| export\ntry: pass\nexcept* ValueError: pass'), ['here: does not parse as Python 3.10']),
    'no docstring': (lesson('#| export\nclass Net: pass\n\ndef _private(): pass'), ['`Net` has no docstring']),
    'own module': (lesson('#| export\nfrom cxr_gan.core import add'), ['import of its own module']),
    'star': (chapter(('code', '#| export\nfrom cxr_gan.phantom import *')), ['import by name']),
    'import among lessons': (chapter(('code', 'y = 1'), cell('code', 'import math\nmath.sqrt(y)', 'here')), ['here', 'without the lesson that defines y']),
    'import and a name known only inside a function': (lesson('import math\nmath.sqrt(a)'), ['here', 'without the lesson that defines a;']),
    'a crowded title': (notebook(('markdown', '# Core\n\n> One line\n\nAnd a paragraph'), *chapter()['cells'][1:]), ['"And a paragraph", which the site drops']),
    'a stored error': (lesson('1/0', [dict(output_type='error', ename='ZeroDivisionError', evalue='division by zero', traceback=[])]), ['here', 'ZeroDivisionError: division by zero']),
    'a traceback': (lesson('1', [stream('Traceback (most recent call last):\n')]), ['here: stores a traceback']),
    'a path': (lesson('1', [stream('saved to /'+'home/someone/run\n')]), ['here: stores a path of one machine']),
    'a clock': (lesson('1', [dict(output_type='display_data', data={'text/html': ['<td>00:12</td>']})]), ['here: stores a clock']),
    'a warning': (lesson('1', [stream('UserWarning: look out\n')]), ['here: stores a warning']),
    'a merge mark': (json.dumps(lesson('x = 1\n<<<<<<< HEAD\nx = 2'), indent=1), ['line', 'a merge mark']),
    'a broken merge': (json.dumps(lesson(), indent=1).replace('"cells"', '<<<<<<< HEAD\n"cells"', 1), ['is not JSON', 'line 2: a merge mark']),
}

@pytest.mark.parametrize('name', FAULTS)
def test_each_fault_is_named(tmp_path, name):
    nb, expected = FAULTS[name]
    found = cn.find_faults(project(tmp_path, {'00_core.ipynb': nb}))
    assert found, name
    for words in expected: assert any(words in f for f in found), f'{words!r} not in {found}'
    assert all('00_core.ipynb' in f or 'cxr_gan/' in f for f in found), found

def test_a_picture_is_not_read_for_paths(tmp_path):
    nb = lesson('1', [dict(output_type='display_data', data={'image/png': '/'+'home/abc/'*9, 'text/plain': '<Figure>'})])
    assert cn.find_faults(project(tmp_path, {'00_core.ipynb': nb})) == []

def test_two_notebooks_on_one_module_and_a_stale_one(tmp_path):
    found = cn.find_faults(project(tmp_path, {'00_core.ipynb': chapter(), '01_more.ipynb': chapter()}, ['core', 'gone']))
    assert len(found) == 2 and 'nbs/00_core.ipynb and nbs/01_more.ipynb: both write module `core`' in found[0] and 'cxr_gan/gone.py: no notebook writes' in found[1]

def test_a_missing_module(tmp_path):
    assert 'cxr_gan/core.py: is missing; run nbdev_export' in cn.find_faults(project(tmp_path, {'00_core.ipynb': chapter()}, []))

@pytest.mark.parametrize('source', ['from cxr_gan.data import add', 'import cxr_gan.data', 'from cxr_gan import data', 'from .data import add', 'def f():\n    "Late."\n    from cxr_gan.data import add',
    'import importlib; importlib.import_module("cxr_gan.data")'])
def test_an_import_of_a_later_chapter(tmp_path, source):
    books = {'00_core.ipynb': chapter(cell('code', '#| export\n'+source, 'here')), '02_data.ipynb': chapter(module='data')}
    found = cn.find_faults(project(tmp_path, books, ['core', 'data']))
    assert len(found) == 1 and '00_core.ipynb, cell here: imports the later chapter `data`' in found[0]

def test_a_lesson_may_not_look_ahead_but_the_index_may_look_everywhere(tmp_path):
    look = ('code', 'from cxr_gan.data import add')
    found = cn.find_faults(project(tmp_path, {'00_core.ipynb': chapter(look), '02_data.ipynb': chapter(module='data'), 'index.ipynb': notebook(TITLE, look)}, ['core', 'data']))
    assert len(found) == 1 and '00_core.ipynb' in found[0]

def test_directives_are_read_as_nbdev_reads_them():
    from execnb.nbio import mk_cell
    from nbdev.process import extract_directives
    for source in ['#| export\nx=1', '\n# | export\n#|hide\nx', '#| default_exp a.b', '# a\n#| export\nx', '#| echo: false\n#| slow\nx', 'x', '', '#| export\n\n#| slow\nx', '   #| hide\nx']:
        theirs = extract_directives(mk_cell(source), remove=False)
        ours = cn.split_directives(source)[0]
        assert {k: ' '.join(v) for k, v in theirs.items()} == ours, source

def test_slow_cells():
    row = dict(book='00_core.ipynb', cell='here', wall=99, first='train()')
    assert cn.slow_cells([dict(row, work=19.)], 20) == []
    found, = cn.slow_cells([dict(row, work=31.)], 20)
    assert '00_core.ipynb, cell here: 31 s of work without `#| slow`' in found

def test_cells_are_timed_where_they_run(tmp_path, monkeypatch):
    import nbdev.config
    burn = 'import os\nt = os.times().user\nwhile os.times().user < t+.3: sum(range(1000))'
    root = project(tmp_path, {'00_core.ipynb': notebook(TITLE, ('code', 'x = 1'), ('code', burn), ('code', '#| slow\n1/0'))})
    (root/'settings.ini').write_text('[DEFAULT]\nrepo = cxr_gan\nlib_name = cxr_gan\nauthor = a\nlib_path = cxr_gan\nnbs_path = nbs\ntst_flags = slow\n')
    monkeypatch.chdir(root); nbdev.config.get_config.cache_clear()
    for v in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): monkeypatch.setenv(v, '1')
    try: ok, rows = cn.timed_nbdev_test(0)
    finally: nbdev.config.get_config.cache_clear(); monkeypatch.delenv('IN_TEST', raising=False)
    assert ok and [r['cell'] for r in rows] == ['a1', 'a2'], 'the slow cell is skipped'
    assert rows[1]['work'] >= .25 and len(cn.slow_cells(rows, .2)) == 1

def test_this_repository_has_no_faults():
    assert cn.find_faults(ROOT) == []

# --- tools/readme.py ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def index(tmp_path):
    (tmp_path/'nbs/images').mkdir(parents=True); (tmp_path/'nbs/images/a.png').write_bytes(b'png'); (tmp_path/'nbs/00_core.ipynb').write_text('{}'); (tmp_path/'LICENSE').write_text('x')
    def write(*cells):
        (tmp_path/'nbs/index.ipynb').write_text(json.dumps(notebook(*cells)))
        return tmp_path/'nbs/index.ipynb', tmp_path
    return write

def test_a_readme(index):
    text = readme.render(*index(
        ('markdown', '# Title\n\n![films](images/a.png) and <img src="images/a.png">\n\n[core](00_core.ipynb#seeds), [licence](../LICENSE), [web](https://x.org/a.b), [here](#top) and `[no](link)`'),
        ('markdown', '```sh\n[not](a-link)\n```'), ('code', '#| hide\nsecret = 1'), ('code', '#| default_exp core'),
        cell('code', '#| eval: true\n1+1', 'b', [dict(output_type='execute_result', data={'text/plain': ['2']})]),
        cell('code', '#| echo: false\ntable()', 'c', [dict(output_type='display_data', data={'text/markdown': ['|a|\n', '|-|'], 'text/plain': ['<Markdown>']})])))
    assert text == readme.HEAD+('# Title\n\n![films](nbs/images/a.png) and <img src="nbs/images/a.png">\n\n[core](nbs/00_core.ipynb#seeds), [licence](LICENSE), [web](https://x.org/a.b), [here](#top) and `[no](link)`'
        '\n\n```sh\n[not](a-link)\n```\n\n```python\n1+1\n```\n\n    2\n\n|a|\n|-|\n')

@pytest.mark.parametrize('bad, message', [
    (('markdown', '[lost](nowhere.md)'), 'leads nowhere'),
    (cell('code', 'plot()', 'b', [dict(output_type='display_data', data={'image/png': 'abc'})]), 'save it under nbs/images'),
    (cell('code', '1/0', 'b', [dict(output_type='error', ename='ZeroDivisionError')]), 'ZeroDivisionError')])
def test_what_a_readme_cannot_hold(index, bad, message):
    with pytest.raises(ValueError, match=message): readme.render(*index(bad))

def test_check_shows_the_difference(index, monkeypatch, capsys):
    _, root = index(('markdown', '# Title'))
    monkeypatch.setattr(readme, 'ROOT', root)
    assert readme.main(['--check']) == 1 and '+# Title' in capsys.readouterr().out
    assert readme.main([]) == 0 and readme.main(['--check']) == 0
    (root/'README.md').write_text((root/'README.md').read_text()+'by hand\n')
    assert readme.main(['--check']) == 1 and '-by hand' in capsys.readouterr().out

def test_a_command_of_the_readme():
    text = 'a\n\n<!-- command: demo -->\n```sh\ndo it\n```\n\n<!-- command: two -->\n```sh\none\ntwo\n```\n'
    assert readme.command('demo', text) == 'do it'
    for name in ('two', 'none'):
        with pytest.raises(ValueError, match='expected one, of one line'): readme.command(name, text)
