"Packaging reads everything from settings.ini; there is nothing else to edit here."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {k.removeprefix('extra_'): v.split() for k,v in cfg.items() if k.startswith('extra_')}

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'], license=cfg['license'],
      keywords=cfg['keywords'], python_requires=f">={cfg['min_python']}", packages=find_packages(include=['jfr2020*']),
      include_package_data=True, package_data={'jfr2020.report': ['assets/*']}, install_requires=cfg['requirements'].split(),
      extras_require=extras, entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['jfr2020=jfr2020._modidx:d']},
      long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      classifiers=[f"Intended Audience :: {cfg['audience']}", 'Development Status :: 3 - Alpha', 'Programming Language :: Python :: 3'])
