"""What setup.cfg cannot say: `patches/` is package data and lies outside of `python/`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("python"), "sglang_dcp.patches"],
    package_dir={"": "python", "sglang_dcp.patches": "patches"},
)
