"""A schema of books for the server, and a prompt on it."""

from tests.support.sessions import message

SCHEMA = (
    "<schema name='shelf'><system>Answer from the books.</system>"
    f"<module name='one'>{message(1, 40)}</module><module name='two'>{message(2, 40)}</module>"
    f"<union><module name='near'>{message(3, 20)}</module><module name='far'>{message(4, 20)}</module></union>"
    "<parameter name='place' length='12'/><module name='now' cache='false'>Today.</module></schema>"
)
PROMPT = "<prompt schema='shelf'><two/><one/><far/></prompt>"
"""Its argument comes besides."""
FULL = PROMPT.replace("schema='shelf'", "schema='shelf' place='Ulm &amp; Bonn'")
