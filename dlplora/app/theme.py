"""How the pages look: one calm theme, light and dark, with the fonts of the machine."""

from pathlib import Path

import gradio as gr

_FONTS = ("system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
STYLE = Path(__file__).with_name("style.css")
_MONO = ("ui-monospace", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Return the theme; no font is fetched."""
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", radius_size="sm", font=_FONTS, font_mono=_MONO
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
    )
