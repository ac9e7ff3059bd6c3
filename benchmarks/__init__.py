# SPDX-License-Identifier: Apache-2.0
"""The op against its peers: see benchmarks/README.md for what is measured and how."""
