"Packaging. Every fact comes from settings.ini; only the wiring stands here."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
for k in ('dicom', 'hub', 'distributed', 'tsne'): extras['dev'] += extras[k] # the tests read DICOM, fetch a model, start processes and draw maps too
pythons = range(int(cfg['min_python'].split('.')[1]), 14) # tried by .github/workflows/test.yml

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license_expression='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    packages=find_packages(include=['cxr_gan', 'cxr_gan.*']), python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Intended Audience :: Education',
        'Topic :: Scientific/Engineering :: Medical Science Apps.',
        *[f'Programming Language :: Python :: 3.{v}' for v in pythons]],
    include_package_data=True, zip_safe=False)
