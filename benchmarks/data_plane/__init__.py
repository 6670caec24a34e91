"""What moving one request and one streamed chunk costs: this router, its peers, and no router.

`engines` cost nothing, `clients` drive, `contenders` are what stands between; `cases` measures,
`verdict` judges figures against the goals, `report` writes them down.
"""
