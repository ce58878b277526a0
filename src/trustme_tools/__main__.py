# SPDX-License-Identifier: Apache-2.0
"""`python -m trustme_tools` is `trustme`."""

from trustme_tools.cli.main import entry

entry()
