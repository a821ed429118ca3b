"""A logger for ML repositories; what it writes is the learner's output (`flops project logs`)."""

from __future__ import annotations

import logging

logger = logging.getLogger("ml_repo")
colorful_logger = logger  # a name that repositories of earlier versions import

if not logger.handlers:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
