//! Generates the types of `schema/`.

use std::{env, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = Path::new(&env::var("OUT_DIR")?).join("schema.rs");
    let read = qapi_codegen::codegen("schema", &out, "relay::schema::HelperCommand".into())?;
    for path in read {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    println!("cargo::rerun-if-changed=schema");
    Ok(())
}
