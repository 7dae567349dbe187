"""The HTTP server of a retriever: the Starlette application, who may use it, its limits, and uvicorn under it.

Nothing is imported here, so that the command line can read the default limits without loading Starlette.
"""
