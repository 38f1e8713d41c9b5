"""What must work wherever the package is installed, without the development tools: run as `python smoke.py` in any folder."""
import importlib, importlib.metadata, pkgutil, sys
from pathlib import Path

HEAVY = ('torch', 'fastai', 'matplotlib', 'numpy', 'sklearn')

def main():
    import cxr_gan
    heavy = [m for m in HEAVY if m in sys.modules]
    assert not heavy, f'import cxr_gan pulls in {heavy}'
    assert cxr_gan.__version__ == importlib.metadata.version('cxr_gan')
    modules = sorted(m.name for m in pkgutil.iter_modules(cxr_gan.__path__) if not m.name.startswith('_'))
    for m in modules: importlib.import_module(f'cxr_gan.{m}')
    print('cxr_gan', cxr_gan.__version__, 'from', Path(cxr_gan.__file__).parent.name, *modules)
    print(*[f'{p} {importlib.metadata.version(p)}' for p in ('torch', 'torchvision', 'fastai', 'fastcore')], sep=', ')

if __name__ == '__main__': main()
