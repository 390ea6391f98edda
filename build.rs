//! Generates the types and the introspection data from `schema/`.

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use qapi_parser::{
    Parser,
    spec::{Command, Data, DataOrType, Enum, Event, Spec, Struct, Type},
};
use serde_json::{Value, json};

/// Prefix of downstream names (QEMU's `docs/devel/qapi-code-gen.rst`).
const PREFIX: &str = "__org.qemu-rdma-helper_";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=schema");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    generate_types(&out)?;
    let schema = Parser::strip_comments(&fs::read_to_string("schema/helper.json")?);
    let schema: Vec<Spec> = Parser::from_string(schema).collect::<Result<_, _>>()?;
    let introspection = Introspection::new(&schema).entities(&schema);
    fs::write(out.join("introspection.json"), Value::from(introspection).to_string())?;
    println!("cargo::rustc-env=QAPI_PREFIX={PREFIX}");
    Ok(())
}

/// Generate the Rust types, whose names have no prefix.
fn generate_types(out: &Path) -> Result<(), Box<dyn Error>> {
    let plain = out.join("schema");
    fs::create_dir_all(&plain)?;
    for file in fs::read_dir("schema")? {
        let file = file?;
        let text = fs::read_to_string(file.path())?.replace(PREFIX, "");
        fs::write(plain.join(file.file_name()), text)?;
    }
    let types = out.join("schema.rs");
    qapi_codegen::codegen(plain, types, "relay::schema::HelperCommand".into())?;
    Ok(())
}

/// Builds the entities of `query-qmp-schema`, as QEMU's `scripts/qapi/introspect.py` does.
struct Introspection {
    /// The name of each type there.
    masked: BTreeMap<String, String>,
    /// Types that are used but not declared: QAPI's own, and lists.
    implied: BTreeMap<String, Value>,
}

/// The type of a command without arguments.
const NOTHING: &str = "q_empty";

impl Introspection {
    fn new(schema: &[Spec]) -> Self {
        let declared = schema.iter().filter_map(|spec| match spec {
            Spec::Struct(Struct { id, .. }) | Spec::Enum(Enum { id, .. }) => Some(id.clone()),
            // The type of its data.
            Spec::Event(Event { id, .. }) => Some(id.clone()),
            _ => None,
        });
        let names = declared.chain([NOTHING.to_owned()]).enumerate();
        let masked = names.map(|(number, id)| (id, format!("rdma-helper-{number}"))).collect();
        Self { masked, implied: BTreeMap::new() }
    }

    fn entities(mut self, schema: &[Spec]) -> Vec<Value> {
        let mut entities: Vec<_> = schema.iter().flat_map(|spec| self.entity(spec)).collect();
        entities
            .push(json!({ "name": self.masked[NOTHING], "members": [], "meta-type": "object" }));
        entities.extend(self.implied.into_values());
        entities
    }

    fn entity(&mut self, spec: &Spec) -> Vec<Value> {
        match spec {
            Spec::Struct(Struct { id, data, .. }) => vec![self.object(id, data)],
            Spec::Enum(Enum { id, data, .. }) => {
                let values: Vec<_> = data.iter().map(|value| value.name().clone()).collect();
                let members: Vec<_> = values.iter().map(|name| json!({ "name": name })).collect();
                let name = &self.masked[id];
                vec![json!({
                    "name": name, "meta-type": "enum", "members": members, "values": values
                })]
            }
            Spec::Event(Event { id, data: DataOrType::Data(data), .. }) => {
                let arguments = &self.masked[id];
                let event = json!({ "name": id, "meta-type": "event", "arg-type": arguments });
                vec![event, self.object(id, data)]
            }
            Spec::Command(Command { id, returns: Some(returns), .. }) => {
                let (returns, arguments) = (self.used(returns), &self.masked[NOTHING]);
                let names =
                    [id.as_str(), id.strip_prefix(PREFIX).expect("a command has the prefix")];
                let command = |name| {
                    json!({
                        "name": name, "meta-type": "command", "arg-type": arguments, "ret-type": returns
                    })
                };
                names.into_iter().map(command).collect()
            }
            other => panic!("schema/helper.json has something new: {other:?}"),
        }
    }

    fn object(&mut self, id: &str, data: &Data) -> Value {
        let members = data.fields.iter().map(|member| {
            let mut shown = json!({ "name": member.name });
            if member.optional {
                shown["default"] = Value::Null;
            }
            shown["type"] = self.used(&member.ty).into();
            shown
        });
        let members: Vec<_> = members.collect();
        json!({ "name": self.masked[id], "members": members, "meta-type": "object" })
    }

    /// The name by which a type is referenced.
    fn used(&mut self, ty: &Type) -> String {
        let element = match (self.masked.get(&ty.name), ty.name.as_str()) {
            (Some(masked), _) => masked.clone(),
            (None, "str") => self.own("str", "string"),
            (None, "bool") => self.own("bool", "boolean"),
            (None, "number") => self.own("number", "number"),
            // Integers of any size.
            (None, "int" | "uint16" | "uint32" | "uint64") => self.own("int", "int"),
            (None, other) => panic!("schema/helper.json has a type that is new: {other}"),
        };
        if !ty.is_array {
            return element;
        }
        let list = format!("[{element}]");
        let entity = json!({ "name": list, "element-type": element, "meta-type": "array" });
        self.implied.insert(list.clone(), entity);
        list
    }

    /// Add one of QAPI's own types.
    fn own(&mut self, name: &str, json_type: &str) -> String {
        let entity = json!({ "name": name, "json-type": json_type, "meta-type": "builtin" });
        self.implied.insert(name.to_owned(), entity);
        name.to_owned()
    }
}
