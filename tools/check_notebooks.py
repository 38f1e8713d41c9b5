"""Fail on what `nbdev_test` cannot see: lost exports, unknown directives, missing ids, clashing or stale modules, and the like.

    python tools/check_notebooks.py             read every notebook, run none (seconds)
    python tools/check_notebooks.py --time      also run them as `nbdev_test` does, and name slow cells without a flag

Each check is one small function from the notebooks to lines of the form `notebook, cell: what is wrong; what to do`.
"""
import argparse, ast, builtins, json, os, re, shutil, symtable, sys, tempfile, time, tokenize
from collections import Counter, defaultdict
from configparser import ConfigParser
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = {'export', 'exports', 'exporti'}
NBDEV = EXPORTS | {'default_exp', 'hide', 'hide_line', 'exec_doc', 'filter_stream'}
QUARTO = {'echo', 'eval', 'output', 'include', 'warning', 'error', 'label', 'code-fold', 'code-summary', 'fig-cap', 'fig-alt', 'tbl-cap', 'layout-ncol', 'column', 'classes'}
PYTHON = (3, 10) # the oldest Python the package promises
LONG = 25 # lines of a cell

@dataclass
class Cell:
    id: str
    type: str
    source: str
    outputs: list = field(default_factory=list)
    directives: dict = field(default_factory=dict)
    body: str = ''
    def __post_init__(self):
        if self.type == 'code': self.directives, self.body = split_directives(self.source)
    @property
    def exported(self): return bool(EXPORTS & self.directives.keys())
    @property
    def lines(self): return sum(bool(l.strip()) for l in self.body.splitlines())

@dataclass
class Book:
    path: Path
    name: str
    raw: str
    cells: list = field(default_factory=list)
    ids: list = field(default_factory=list) # as stored; None where there is none
    broken: str = '' # what json said
    @property
    def code(self): return [c for c in self.cells if c.type == 'code']
    @property
    def number(self): return (int(m[1]), m[2]) if (m := re.match(r'(\d+)([a-z]?)_', self.path.name)) else None # 04 < 04a < 05
    @property
    def modules(self): return [c.directives['default_exp'] for c in self.code if c.directives.get('default_exp')]

def split_directives(source):
    "The leading `#|` lines as nbdev reads them (name -> argument), and the rest of the cell."
    lines, found = source.splitlines(), {}
    for i, line in enumerate(lines):
        if m := re.match(r'\s*#\s*\|\s*([\w-]+:?)\s*(.*)', line): found[m[1]] = m[2].strip()
        elif line.strip() and not re.match(r'\s*%%\w+', line): return found, '\n'.join(lines[i:])
    return found, ''

def read_book(path, root):
    "One notebook; a file that is no notebook keeps its fault in `broken`."
    book = Book(path, path.relative_to(root).as_posix(), path.read_text(encoding='utf-8'))
    try: nb = json.loads(book.raw)
    except ValueError as e: book.broken = str(e); return book
    for i, c in enumerate(nb['cells']):
        outputs = c.get('outputs', [])
        book.cells.append(Cell(c.get('id') or f'number {i}', c['cell_type'], ''.join(c['source']), outputs))
    book.ids = [c.get('id') for c in nb['cells']]
    return book

def read_books(root):
    "Every notebook under `nbs/` that nbdev looks at."
    paths = sorted((root/'nbs').rglob('*.ipynb'))
    return [read_book(p, root) for p in paths if not any(part.startswith(('.', '_')) for part in p.relative_to(root).parts)]

def settings(root):
    "The `DEFAULT` section of settings.ini."
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def plain(source): return re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M)

def tree(source):
    "The syntax tree under the oldest promised Python, or None."
    try: return ast.parse(plain(source), feature_version=PYTHON)
    except SyntaxError: return None

def comments(source):
    "(line number, text) of each comment, strings left alone."
    try: return [(t.start[0], t.string) for t in tokenize.generate_tokens(StringIO(plain(source)).readline) if t.type == tokenize.COMMENT]
    except (tokenize.TokenError, SyntaxError): return [(i, l.strip()) for i, l in enumerate(source.splitlines(), 1) if l.strip().startswith('#')]

# --- the checks -----------------------------------------------------------------------------------------------------------------

def is_a_notebook(books, root):
    for b in books:
        if b.broken: yield f'{b.name}: is not JSON ({b.broken}); an unfinished merge leaves this: run nbdev_fix or restore it'

def merge_marks(books, root):
    for f in [*[b.path for b in books], *sorted((root/'cxr_gan').glob('*.py'))]:
        for i, line in enumerate(f.read_text(encoding='utf-8').splitlines(), 1):
            if re.match(r'\s*"?(<{7}|>{7}|\|{7})( |\\n|"|$)', line): yield f'{f.relative_to(root).as_posix()}, line {i}: a merge mark; finish the merge'

def cell_ids(books, root):
    for b in books:
        if b.broken: continue
        for i, cell_id in enumerate(b.ids):
            if not cell_id: yield f'{b.name}, cell number {i}: has no id; run nbdev_clean'
        for cell_id, n in Counter(filter(None, b.ids)).items():
            if n > 1: yield f'{b.name}, cell {cell_id}: {n} cells share this id; delete all but one of the ids and run nbdev_clean'

def unknown_directives(books, root):
    flags = set(settings(root).get('tst_flags', '').split())
    for b in books:
        for c in b.code:
            for name, arg in c.directives.items():
                if name.rstrip(':') in (QUARTO if name.endswith(':') else NBDEV | flags): continue
                if name in QUARTO: yield f'{b.name}, cell {c.id}: directive `#| {name}` needs a colon: `#| {name}: {arg or "..."}`'
                else: yield f'{b.name}, cell {c.id}: unknown directive `#| {name}` is ignored by nbdev; known here: {", ".join(sorted(NBDEV | flags))}'
            if arg := next((c.directives[e] for e in EXPORTS if c.directives.get(e)), ''):
                yield f'{b.name}, cell {c.id}: `#| export {arg}` writes into another module; one notebook, one module: write `#| export`'

def lost_directives(books, root):
    "A directive that stands where nbdev does not read it, or lacks its bar."
    names = '|'.join([*EXPORTS, 'default_exp', 'hide', *settings(root).get('tst_flags', '').split()])
    for b in books:
        for c in b.code:
            first = len(c.source.splitlines())-len(c.body.splitlines())
            for i, text in comments(c.source):
                if i > first and re.match(r'#\s*\|', text) and not re.match(r'#\s*\|\s*hide_line\s*$', text):
                    yield f'{b.name}, cell {c.id}, line {i}: `{text}` stands below other lines, so nbdev does not see it; move it to the top of the cell'
                elif re.match(rf'#+\s*[!:]?\s*({names})(\s+\w+)?\s*$', text) or re.match(r'##+\s*\|', text):
                    yield f'{b.name}, cell {c.id}, line {i}: `{text}` is a plain comment; a directive is written `#| name`'

def one_module_each(books, root):
    owners = defaultdict(list)
    for b in books:
        if len(b.modules) > 1: yield f'{b.name}: {len(b.modules)} cells with `#| default_exp`; keep one'
        for m in set(b.modules): owners[m].append(b.name)
        if not b.modules and (lost := [c.id for c in b.code if c.exported]):
            yield f'{b.name}, cell {lost[0]}: exports without `#| default_exp`, so nothing is written; name the module in the first code cell'
        elif b.modules and not any(c.exported for c in b.code): yield f'{b.name}: names module `{b.modules[0]}` but exports no cell; lost `#| export`?'
    for m, names in owners.items():
        if len(names) > 1: yield f'{" and ".join(names)}: both write module `{m}`, the later overwrites the earlier; rename one'

def stale_modules(books, root):
    owned = {m.replace('.', '/') for b in books for m in b.modules}
    for f in sorted((root/'cxr_gan').rglob('*.py')):
        name = f.relative_to(root/'cxr_gan').with_suffix('').as_posix()
        if not name.split('/')[-1].startswith('_') and name not in owned:
            yield f'cxr_gan/{name}.py: no notebook writes this module; delete it, or export its notebook'
    for m in sorted(owned):
        if not (root/f'cxr_gan/{m}.py').exists(): yield f'cxr_gan/{m}.py: is missing; run nbdev_export'

def own_imports(node):
    "Names of this package's modules that a syntax tree imports, wherever in it, with `*` after a star import."
    for n in ast.walk(node):
        names, star = [], ''
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = ('cxr_gan.' if n.level else '') + (n.module or '')
            star = '*' if n.names[0].name == '*' else ''
            names = [f'{base.rstrip(".")}.{a.name}' for a in n.names] if base.rstrip('.') == 'cxr_gan' and not star else [base]
        elif isinstance(n, ast.Call) and n.args and isinstance(n.args[0], ast.Constant) and getattr(n.func, 'attr', getattr(n.func, 'id', '')) in ('import_module', '__import__'):
            names = [str(n.args[0].value)]
        for name in names:
            if name.split('.')[0] == 'cxr_gan': yield '.'.join(name.split('.')[1:]), star

def later_chapters(books, root):
    number = {m: b.number for b in books for m in b.modules}
    for b in books:
        for c in b.code:
            for m, star in own_imports(tree(c.body) or ast.Module([], [])):
                if star and c.exported: yield f'{b.name}, cell {c.id}: exports `from cxr_gan.{m} import *`; import by name'
                if b.number is None or m not in number: continue
                own = b.modules == [m]
                if own and c.exported: yield f'{b.name}, cell {c.id}: exports an import of its own module `{m}`'
                elif not own and (number[m] is None or number[m] >= b.number):
                    yield f'{b.name}, cell {c.id}: imports the later chapter `{m}`; a chapter uses only chapters with lower numbers'

def magics(books, root):
    for b in books:
        for c in b.code:
            if c.exported and (m := re.search(r'^\s*(%%?|!)\w.*$|^[^#\'"]*=\s*[!%]\w', c.source, re.M)):
                yield f'{b.name}, cell {c.id}: `{m[0].strip()}` is no Python outside a notebook; take it out of the exported cell'

def defined_twice(books, root):
    for b in books:
        seen = {}
        for c in b.code:
            for d in (tree(c.body).body if c.exported and tree(c.body) else []):
                if not isinstance(d, (ast.FunctionDef, ast.ClassDef)) or d.decorator_list: continue
                if d.name in seen: yield f'{b.name}, cell {c.id}: `{d.name}` is defined in cell {seen[d.name]} already, and this one replaces it; keep one'
                seen[d.name] = c.id

def old_python(books, root):
    for b in books:
        for c in b.code:
            if c.exported and tree(c.body) is None: yield f'{b.name}, cell {c.id}: does not parse as Python {PYTHON[0]}.{PYTHON[1]}'
    for f in [f for d in ('cxr_gan', 'tools', 'tests', 'benchmarks') for f in sorted((root/d).rglob('*.py'))]:
        try: ast.parse(f.read_text(encoding='utf-8'), feature_version=PYTHON)
        except SyntaxError as e: yield f'{f.relative_to(root).as_posix()}, line {e.lineno}: does not parse as Python {PYTHON[0]}.{PYTHON[1]}: {e.msg}'

def docstrings(books, root):
    for b in books:
        for c in b.code:
            if not c.exported: continue
            for d in (tree(c.body) or ast.Module([], [])).body:
                if isinstance(d, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not d.name.startswith('_') and not ast.get_docstring(d):
                    yield f'{b.name}, cell {c.id}: `{d.name}` has no docstring; one line, with its source if it has one'

def global_names(source):
    "(global names that a cell binds, global names that it reads, also from inside its functions)."
    top = symtable.symtable(plain(source), 'cell', 'exec')
    scopes = [top]
    for s in scopes: scopes += s.get_children()
    read = {y.get_name() for s in scopes for y in s.get_symbols() if y.is_referenced() and (s is top or y.is_global())}
    return {y.get_name() for y in top.get_symbols() if y.is_assigned() or y.is_imported()}, read

def mixed_imports(books, root):
    "The documentation job runs each cell that imports, without the lessons before it (`exec_show_docs` of nbdev)."
    for b in books:
        known = {*dir(builtins), 'display', 'get_ipython'}
        for c in b.code if b.modules else []:
            if not (body := tree(c.body)): continue
            imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(body))
            if not (c.exported or imports and c.directives.get('eval:') != 'false'): continue
            bound, read = global_names(c.body)
            if not c.exported and (missing := sorted(read-bound-known)):
                yield f'{b.name}, cell {c.id}: imports, so the documentation job runs it, without the lesson that defines {", ".join(missing)}; move the import to a cell of imports'
            known |= bound

def title_cells(books, root):
    "nbdev turns the whole title cell into the page's front matter: other text in it never reaches the site."
    for b in books:
        title = next((c for c in b.cells if c.type == 'markdown'), None)
        if b.broken or b.path.name.startswith('index'): continue
        if not title or not re.match(r'# \S', title.source): yield f'{b.name}: does not begin with a title cell `# Title`, blank line, `> one line`'
        elif rest := [l for l in title.source.splitlines()[1:] if l.strip() and not l.startswith('>')]:
            yield f'{b.name}, cell {title.id}: the title cell goes on with "{rest[0][:40]}", which the site drops; begin a new cell below the `>` line'

FAULTY_OUTPUTS = {
    'a traceback': r'Traceback \(most recent call last\)',
    'a path of one machine': r'(?<![\w.])(/(?:home|root|work|tmp|Users|content|mnt|opt)/[\w.]+|[A-Z]:\\\\?Users)',
    'an address in memory': r'\bat 0x[0-9a-fA-F]{6,}',
    'a clock': r'(?<![\d:.])\d\d:\d\d(?::\d\d)?(?![\d:])',
    'a timing': r'(?:CPU times|Wall time|\d(?:it/s|s/it)\b|\d [mµn]?s ± )',
    'a progress bar': r'[█▏▎▍▌▋▊▉]{2}|<progress',
    'a warning': r'\b\w+Warning: '}

def output_text(o):
    "What a reader would read in one stored output; pictures left out."
    data = {k: v for k, v in o.get('data', {}).items() if not k.startswith('image/')}
    parts = [o.get('text', ''), *data.values(), o.get('traceback', '')]
    return re.sub(r'data:image/[^"\')]+', '', '\n'.join(''.join(p) if isinstance(p, (list, str)) else json.dumps(p) for p in parts))

def stored_outputs(books, root):
    for b in books:
        for c in b.code:
            for o in c.outputs:
                if o['output_type'] == 'error': yield f'{b.name}, cell {c.id}: stores the error {o.get("ename")}: {o.get("evalue", "")[:60]}; mend it and run again'
                for what, pattern in FAULTY_OUTPUTS.items():
                    if o['output_type'] != 'error' and (m := re.search(pattern, output_text(o))):
                        yield f'{b.name}, cell {c.id}: stores {what} ("{m[0][:60]}") in its output; keep it out or run again'

CHECKS = [is_a_notebook, merge_marks, cell_ids, unknown_directives, lost_directives, one_module_each, stale_modules, later_chapters, magics, defined_twice, old_python,
    docstrings, mixed_imports, title_cells, stored_outputs]

def find_faults(root=ROOT):
    "Every fault of the notebooks under `root`, as lines of text."
    books = read_books(root)
    return [line for check in CHECKS for line in check(books, root)]

def find_warnings(root=ROOT):
    "What a reader may want to look at; fails nothing."
    for b in read_books(root):
        for c in b.code:
            if c.lines > LONG: yield f'{b.name}, cell {c.id}: {c.lines} lines; would two cells read better?'
        if b.path.stat().st_size > 1_500_000: yield f'{b.name}: {b.path.stat().st_size/1e6:.1f} MB; fewer or smaller pictures?'

# --- running them ---------------------------------------------------------------------------------------------------------------

def spent():
    "Seconds of work of this process and its finished children: unlike the wall clock it does not see the neighbours."
    t = os.times()
    return t.user+t.system+t.children_user+t.children_system

def timed_nbdev_test(n_workers, flags='', pattern=None):
    "Run `nbdev_test` with a stop watch in each cell. Returns (success, rows of notebook, cell, work and wall seconds)."
    import nbdev.test
    log = Path(tempfile.mkdtemp())/'cells.jsonl'
    class Watched(nbdev.test.CaptureShell):
        def __init__(self, path): self.book = Path(path); super().__init__(path)
        def cell(self, cell, **kw):
            work, wall = spent(), time.perf_counter()
            try: return super().cell(cell, **kw)
            finally:
                row = dict(book=self.book.name, cell=cell.get('id', ''), work=spent()-work, wall=time.perf_counter()-wall, first=next(iter(cell.source.splitlines()), '')[:70])
                with log.open('a') as f: f.write(json.dumps(row)+'\n') # one short line: appended whole, also by two processes
    old, nbdev.test.CaptureShell = nbdev.test.CaptureShell, Watched
    try: nbdev.test.nbdev_test.__wrapped__(path=pattern, n_workers=n_workers, flags=flags, timing=True); ok = True
    except SystemExit: ok = False
    finally:
        nbdev.test.CaptureShell = old
        rows = [json.loads(l) for l in log.read_text().splitlines()] if log.exists() else []
        shutil.rmtree(log.parent)
    return ok, rows

def slow_cells(rows, limit):
    "Cells that ran without a flag and worked longer than `limit` seconds; `nbdev_test` skipped the flagged ones."
    return [f'{r["book"]}, cell {r["cell"]}: {r["work"]:.0f} s of work without `#| slow` (limit {limit:g}); flag it and give it a small sibling: {r["first"]}'
        for r in rows if r['work'] > limit]

def workers():
    "(processes, threads each) that fill this machine's cores without crowding them."
    n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return (2, max(1, n//2)) if n > 1 else (1, 1)

def run_notebooks(limit, flags='', pattern=None):
    "Run every notebook and print what was slow, which fails nothing: seconds say as much of the machine as of a cell. Returns whether all passed."
    n, threads = workers()
    for v in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(v, str(threads))
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
    ok, rows = timed_nbdev_test(n, flags, pattern)
    print('slowest cells (seconds of work, wall):', *[f'  {r["work"]:6.1f} {r["wall"]:6.1f}  {r["book"]} {r["cell"]}  {r["first"]}' for r in sorted(rows, key=lambda r: -r['work'])[:5]], sep='\n')
    for line in [] if flags else slow_cells(rows, limit): print('look  ', line)
    return ok

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--time', action='store_true', help='also run the notebooks')
    p.add_argument('--limit', type=float, default=20., help='seconds of work after which an unflagged cell is named (two cores in 10 s)')
    p.add_argument('--flags', default='', help='flags to run as well, e.g. "slow"')
    p.add_argument('--path', help='with --time: only this notebook')
    a = p.parse_args(argv)
    os.chdir(ROOT)
    faults = find_faults()
    for line in find_warnings(): print('look  ', line)
    for line in faults: print('FAULT ', line)
    print(f'{len(read_books(ROOT))} notebooks read, {len(faults)} faults' + ('' if a.time else ' (not run: --time also finds slow cells)'), flush=True)
    ok = run_notebooks(a.limit, a.flags, a.path) if a.time else True
    return int(bool(faults) or not ok)

if __name__ == '__main__': sys.exit(main())
