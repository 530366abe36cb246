"""From a capture to an answer: read captures, attribute time to modules, show and compare."""

from .capture.scrub import scrub
from .diff import Change, Comparison, diff
from .render_csv import render_csv
from .render_html import render_html
from .render_json import render_json
from .render_text import render_text
from .report import Report, from_recording, load
from .views import VIEWS, Row

__all__ = [
    "VIEWS",
    "Change",
    "Comparison",
    "Report",
    "Row",
    "diff",
    "from_recording",
    "load",
    "render_csv",
    "render_html",
    "render_json",
    "render_text",
    "scrub",
]
