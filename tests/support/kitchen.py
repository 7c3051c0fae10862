"""A schema of a kitchen, with everything that a schema may hold, and a prompt on it."""

SCHEMA = """<schema name="kitchen">
<parameter name="guest" length="3"/>
<module name="pantry">
  Shelf of <parameter name="owner" length="2"/>.
  <module name="flour">Flour.</module>
  <module name="sugar">Sugar.</module>
  <system>
    Rules.
    <union scaffold="gas">
      <module name="gas">Gas.</module>
      <module name="coal">Coal.</module>
    </union>
    <module name="clock">Clock.</module>
  </system>
  <module name="salt">Salt.</module>
</module>
<union>
  <module name="soup">Soup for <parameter name="many" length="2"/></module>
  <module name="cake">Cake.<module name="icing">Icing.</module></module>
</union>
<module name="wine">Wine.</module>
Now cook.
<module name="late">Late.</module>
</schema>
"""
PROMPT = """<prompt schema="kitchen" guest="Ann">
  <pantry owner="me"><sugar/><coal/> and <clock/></pantry> then <soup many="2"/><wine/>
  <late/><user>Go!</user><assistant/></prompt>"""
