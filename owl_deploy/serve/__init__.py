"""`owl serve`: a deployment behind the part of OpenAI's HTTP API that people's clients use.

`protocol` is the format, `stops` finds strings that end an answer, `scheduler` has who waits and
who is answered, `server` has the endpoints.
"""
