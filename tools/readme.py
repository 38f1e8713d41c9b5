"""Write README.md from nbs/index.ipynb, with nothing but Python.

    python tools/readme.py                 write README.md
    python tools/readme.py --check         exit 1 with a diff where README.md differs from its notebook
    python tools/readme.py --command NAME  print the command that follows `<!-- command: NAME -->` in README.md

Markdown cells are taken as they are, with relative links seen from the repository root; code cells become fenced blocks and their text
outputs indented ones. Cells flagged `#| hide`, `#| export` or `#| default_exp` are left out. A picture is a file beside the notebook.
"""
import argparse, difflib, json, posixpath, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = '<!-- Written from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n'
LINK = re.compile(r'(!?\[[^\]]*\]\()([^)\s]+)|(<(?:img|a)\b[^>]*?\b(?:src|href)=")([^"]+)')

def moved(target, root, folder='nbs'):
    "A link that is relative to `folder`, as seen from `root`. Raises ValueError where it leads nowhere."
    if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', target, re.I): return target
    path, mark, anchor = target.partition('#')
    new = posixpath.normpath(posixpath.join(folder, path))
    if not (root/new).exists(): raise ValueError(f'the link `{target}` leads nowhere: there is no {new}')
    return new+mark+anchor

def relink(text, root):
    "Every relative link of a Markdown text moved, code left alone."
    def sub(m): return (m[1] or m[3])+moved(m[2] or m[4], root)
    parts = re.split(r'(^```.*?^```[^\n]*$|`[^`\n]+`)', text, flags=re.M | re.S)
    return ''.join(p if i % 2 else LINK.sub(sub, p) for i, p in enumerate(parts))

def shown(output):
    "One stored output as Markdown. Raises ValueError on what a README cannot hold."
    if output['output_type'] == 'error': raise ValueError(f'a cell stores the error {output.get("ename")}: mend it and run it again')
    data = output.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    if any(k.startswith('image/') for k in data): raise ValueError('a cell stores a picture: save it under nbs/images and link it, so that README.md can show it')
    text = ''.join(output.get('text') or data.get('text/plain') or '')
    return ''.join('    '+l if l.strip() else l for l in text.rstrip('\n').splitlines(True))

def code(cell, source):
    "A code cell and its outputs as Markdown, or nothing where it is hidden."
    flags = re.findall(r'^\s*#\s*\|\s*([\w-]+:?)\s*(\S*)', source, re.M)
    if {n for n, _ in flags} & {'hide', 'export', 'exporti', 'exports', 'default_exp'} or ('include:', 'false') in flags: return []
    body = re.sub(r'^\s*#\s*\|.*\n?', '', source, flags=re.M).strip('\n')
    fence = [f'```python\n{body}\n```'] if body and ('echo:', 'false') not in flags else []
    return fence+[s for o in cell.get('outputs', []) if (s := shown(o))]

def render(path, root=ROOT):
    "The notebook at `path` as the text of README.md."
    blocks = []
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source'])
        if c['cell_type'] == 'markdown': blocks.append(relink(source.strip('\n'), root))
        elif c['cell_type'] == 'code': blocks += code(c, source)
    return HEAD+'\n\n'.join(blocks)+'\n'

def command(name, text):
    "The one command line that follows `<!-- command: name -->`. Raises ValueError unless there is exactly one."
    found = re.findall(rf'<!-- command: {re.escape(name)} -->\s*```\w*\n(.*?)\n```', text, re.S)
    if len(found) != 1 or '\n' in found[0].strip(): raise ValueError(f'README.md has {len(found)} blocks after `<!-- command: {name} -->`; expected one, of one line')
    return found[0].strip()

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--check', action='store_true', help='write nothing; exit 1 where they differ')
    p.add_argument('--command', metavar='NAME', help='print a command of README.md')
    a = p.parse_args(argv)
    readme = ROOT/'README.md'
    old = readme.read_text(encoding='utf-8') if readme.exists() else ''
    try:
        if a.command: print(command(a.command, old)); return 0
        new = render(ROOT/'nbs'/'index.ipynb')
    except ValueError as e: print(f'tools/readme.py: {e}', file=sys.stderr); return 1
    if not a.check: readme.write_text(new, encoding='utf-8'); return 0
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), 'README.md', 'nbs/index.ipynb', lineterm=''))
    if diff: print(*diff, 'README.md differs from its notebook; run: python tools/readme.py', sep='\n')
    return int(bool(diff))

if __name__ == '__main__': sys.exit(main())
