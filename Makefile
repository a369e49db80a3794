# One command each; `make site` needs `pip install -e ".[site]"`.
.PHONY: site test style

site:  ## the lessons as HTML: open site/_build/html/index.html
	jupyter-book build notebooks --path-output site --warningiserror --keep-going

test:
	pytest -q

style:
	ruff check .
	ruff format --check .
	mypy
