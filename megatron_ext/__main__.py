"""``python -m megatron_ext COMMAND``."""

import sys

from .cli import main

sys.exit(main())
