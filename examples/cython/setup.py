"""python setup.py build_ext --inplace"""
from Cython.Build import cythonize
from setuptools import Extension, setup

import ioproc

device = Extension("device", ["device.pyx"], include_dirs=[ioproc.get_include()])
setup(name="device", ext_modules=cythonize([device]))
