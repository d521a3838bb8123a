"""One HTML page for readers who have no MLflow: scores, receipts, figures and tables, without network.

contents.py     what is on the page, from the same candidates as `dinobench compare`
sections.py     scores, a table per suite
receipts.py     what a score was made from, and how to check it
documents.py    tables that `dinobench table` wrote
pictures.py     figures as data URIs, harmless and within a size
render.py       the page from its template, page.html.j2, with page.css and page.js in it
"""
