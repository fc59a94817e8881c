"""python setup.py build_ext --inplace"""
from setuptools import Extension, setup

import ioproc

setup(name="device", ext_modules=[Extension("device", ["device.c"], include_dirs=[ioproc.get_include()])])
