"""One file a page: what it shows, and what its buttons do."""

import gradio as gr
from gradio.components import Navbar

from dlplora.app.context import Context
from dlplora.app.pages.adapters import AdaptersPage
from dlplora.app.pages.ask import AskPage
from dlplora.app.pages.data import DataPage
from dlplora.app.pages.models import ModelsPage
from dlplora.app.pages.routers import RoutersPage
from dlplora.app.pages.runs import RunsPage
from dlplora.app.pages.start import StartPage

_PAGES = {
    "Data": DataPage,
    "Adapters": AdaptersPage,
    "Routers": RoutersPage,
    "Ask": AskPage,
    "Runs": RunsPage,
    "Models": ModelsPage,
}


def all_pages(context: Context) -> gr.Blocks:
    """Build the pages, each at an address of its own."""
    demo: gr.Blocks
    with gr.Blocks(title="dlplora", analytics_enabled=False) as demo:
        Navbar(main_page_name="Start")
        StartPage(context, demo)
    for name, page in _PAGES.items():
        with demo.route(name, f"/{name.lower()}"):
            Navbar(main_page_name="Start")
            page(context, demo)
    return demo
