"""A comparison and its rows -> Vega-Lite specifications."""
