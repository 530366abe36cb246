"""From a capture to an answer: read captures, attribute time to modules, show and compare."""

from .load import from_recording, load
from .render_text import render_text
from .report import Report
from .views import VIEWS, Row

__all__ = ["VIEWS", "Report", "Row", "from_recording", "load", "render_text"]
