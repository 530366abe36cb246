"""From a capture to an answer: read captures, attribute time to modules, show and compare."""

from .capture import scrub
from .diff import Change, Comparison, diff
from .findings import first_screen
from .render import render_text
from .render.data import render_csv, render_html, render_json
from .render.traces import write_chrome, write_speedscope
from .report import Report, from_recording, load
from .rows import Row
from .selection import VIEWS

__all__ = [
    "VIEWS",
    "Change",
    "Comparison",
    "Report",
    "Row",
    "diff",
    "first_screen",
    "from_recording",
    "load",
    "render_csv",
    "render_html",
    "render_json",
    "render_text",
    "scrub",
    "write_chrome",
    "write_speedscope",
]
