"""All the tests, in the order in which they fail cheapest: what the notebooks look like, README.md, the notebooks' lessons, then pytest.

    python tools/run_tests.py                 what CI runs: everything but the cells flagged slow or cuda
    python tools/run_tests.py --flags slow    run these cells too
"""
import argparse, subprocess, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check_notebooks import ROOT

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--flags', default='', help='flags of cells to run as well, e.g. "slow cuda"')
    a = p.parse_args(argv)
    steps = [['tools/readme.py', '--check'], ['tools/check_notebooks.py', '--time', '--flags', a.flags], ['-m', 'pytest']]
    for step in steps:
        print('==', 'python', *step, flush=True)
        if rc := subprocess.run([sys.executable, *step], cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
            print(f'== failed: python {" ".join(step)}', file=sys.stderr); return rc
    return 0

if __name__ == '__main__': sys.exit(main())
