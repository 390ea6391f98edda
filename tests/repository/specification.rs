//! docs/specification.md: each promise has a unique number and a test that exists.

use std::{collections::HashSet, fs, path::Path};

/// Append the text of all files under a directory that may hold tests.
fn sources(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if let Ok(content) = fs::read_to_string(&path) {
            text.push_str(&content);
        }
    }
}

/// Return the names in backticks.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_promise_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let specification = fs::read_to_string(root.join("docs/specification.md")).unwrap();
    let mut code = String::new();
    for directory in ["src", "tests", "packaging", "scripts"] {
        sources(&root.join(directory), &mut code);
    }
    let exists = |name: &str| {
        let file = name.split(' ').next().unwrap();
        let fuzz_target = root.join(format!("tests/fuzz/{name}.rs"));
        if file.contains('/') {
            return root.join(file).exists();
        }
        code.contains(&format!("fn {name}("))
            || code.contains(&format!("\n{name}()"))
            || fuzz_target.exists()
    };
    let mut numbers = HashSet::new();
    for row in specification.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let mut cells = row.trim_matches('|').split(" | ");
        let number = cells.next().unwrap().trim();
        if number == "no." {
            continue;
        }
        assert!(numbers.insert(number), "two promises have the number {number}");
        let tests = cells.nth(1).unwrap_or_else(|| panic!("{number} has no test"));
        let missing: Vec<_> = names(tests).filter(|name| !exists(name)).collect();
        assert!(missing.is_empty(), "{number}: no test {missing:?}");
        // A promise that names none must say that every test relies on it.
        assert!(names(tests).next().is_some() || tests.contains("every test"), "{number}: {tests}");
    }
    assert!(numbers.len() > 60, "the table is not read");
}
