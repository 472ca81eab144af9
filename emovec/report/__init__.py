"""Pages and pictures of readings: each section is a function that returns HTML, a page is a list of sections.

``page`` puts sections into one file; ``heatmap``, ``charts``, ``tables`` and ``prose`` make them; ``overview`` is the page of
one reading; ``picture`` draws a still one as SVG. Nothing here needs more than emovec itself, and no page asks anything of
the network.
"""
