"""The HTTP server of a retriever: the Starlette application, access control, limits, and uvicorn.

Nothing is imported here, so that the command line can read the default limits without loading Starlette.
"""
