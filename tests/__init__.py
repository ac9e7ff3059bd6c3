# SPDX-License-Identifier: Apache-2.0
"""A package, since the benchmarks import the oracle: another's folder of this name, which some
packages leave among the installed ones, would else come before this one.
"""
