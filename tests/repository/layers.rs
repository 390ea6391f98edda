//! The top-level modules of `src/`: which may import from which, and that no two files import from
//! each other, directly or indirectly.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use syn::{
    Attribute, Item, ItemMod, ItemUse, UseTree,
    visit::{self, Visit},
};

/// From top to bottom: each top-level module, and those below it from which it may import.
const LAYERS: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "relay", "worker", "sandbox", "fabric", "memory", "wire", "qemu", "qmp", "control",
            "ram", "address", "text",
        ],
    ),
    (
        "relay",
        &[
            "worker", "sandbox", "proto", "fabric", "memory", "qemu", "qmp", "control", "ram",
            "address", "threads", "patience",
        ],
    ),
    (
        "worker",
        &[
            "proto", "fabric", "memory", "wire", "stream", "qemu", "qmp", "control", "ram",
            "address", "refusals", "threads", "patience",
        ],
    ),
    ("sandbox", &[]),
    ("proto", &["fabric", "memory", "wire", "stream", "control", "ram", "threads", "patience"]),
    ("fabric", &["memory", "control", "ram", "address", "refusals", "threads", "patience", "text"]),
    ("memory", &["ram"]),
    ("wire", &["ram", "text"]),
    ("stream", &["ram", "text"]),
    ("qemu", &["qmp", "control", "ram", "address", "text"]),
    ("qmp", &["address", "text"]),
    ("control", &["address", "text"]),
    ("ram", &[]),
    ("address", &[]),
    ("refusals", &[]),
    ("threads", &[]),
    ("patience", &[]),
    ("text", &[]),
];

/// A module's path from the root of the crate.
type Module = Vec<String>;

/// The modules that a file names outside its tests.
struct Named<'a> {
    modules: &'a BTreeMap<Module, PathBuf>,
    file: Module,
    /// The module being read: the file's, or one inside it.
    inside: Module,
    found: BTreeSet<Module>,
}

impl Named<'_> {
    fn path(&mut self, path: &[String]) {
        let Some(mut target) = self.resolve(path) else { return };
        while !target.is_empty() && !self.modules.contains_key(&target) {
            target.pop();
        }
        if !target.is_empty() && target != self.file {
            self.found.insert(target);
        }
    }

    /// Return the path from the root; `None` in another crate, and for what a `use` has named.
    fn resolve(&self, path: &[String]) -> Option<Module> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" | "qemu_rdma_helper" => Some(rest.to_vec()),
            "self" => Some([&self.inside, rest].concat()),
            "super" => {
                let mut module = self.inside.clone();
                module.pop();
                let mut rest = rest;
                while rest.first().is_some_and(|first| first == "super") {
                    module.pop();
                    rest = &rest[1..];
                }
                Some([&module, rest].concat())
            }
            _ => {
                let child = [&self.inside, path].concat();
                let is_one = self.modules.contains_key(&child[..=self.inside.len()]);
                is_one.then_some(child)
            }
        }
    }

    fn tree(&mut self, before: &[String], tree: &UseTree) {
        let with = |ident: &syn::Ident| [before, &[ident.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.tree(&with(&path.ident), &path.tree),
            UseTree::Name(name) if name.ident == "self" => self.path(before),
            UseTree::Name(name) => self.path(&with(&name.ident)),
            UseTree::Rename(name) if name.ident == "self" => self.path(before),
            UseTree::Rename(name) => self.path(&with(&name.ident)),
            UseTree::Glob(_) => self.path(before),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(before, tree)),
        }
    }
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"))
    })
}

impl<'ast> Visit<'ast> for Named<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Static(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !is_test(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        self.inside.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.inside.pop();
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.tree(&[], &item.tree);
    }

    fn visit_visibility(&mut self, _visibility: &'ast syn::Visibility) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<_> =
            path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if segments.len() > 1 {
            self.path(&segments);
        }
        visit::visit_path(self, path);
    }
}

/// Return each module with a file of its own, except tests.
fn modules() -> BTreeMap<Module, PathBuf> {
    fn walk(directory: &Path, module: &Module, found: &mut BTreeMap<Module, PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if stem == "tests" || module.is_empty() && (stem == "main" || stem == "lib") {
                continue;
            }
            let mut child = module.clone();
            if stem != "mod" {
                child.push(stem);
            }
            if path.is_dir() {
                walk(&path, &child, found);
            } else {
                assert!(found.insert(child, path.clone()).is_none(), "{path:?}");
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &Vec::new(), &mut found);
    found
}

/// Return the modules from which each module imports.
fn imports() -> BTreeMap<Module, BTreeSet<Module>> {
    let modules = modules();
    let read = |(module, path): (&Module, &PathBuf)| {
        let file = syn::parse_file(&fs::read_to_string(path).unwrap()).unwrap();
        let (file_module, inside, found) = (module.clone(), module.clone(), BTreeSet::new());
        let mut named = Named { modules: &modules, file: file_module, inside, found };
        named.visit_file(&file);
        (module.clone(), named.found)
    };
    modules.iter().map(read).collect()
}

#[test]
fn imports_point_down() {
    let place = |room: &str| LAYERS.iter().position(|(name, _)| *name == room);
    for (room, below) in LAYERS {
        for other in *below {
            assert!(place(other) > place(room), "{other} is not below {room}");
        }
    }
    let mut wrong = Vec::new();
    for (module, imports) in imports() {
        for import in imports.into_iter().filter(|import| import[0] != module[0]) {
            let room = place(&module[0]).unwrap_or_else(|| panic!("{} has no place", module[0]));
            if !LAYERS[room].1.contains(&import[0].as_str()) {
                wrong.push(format!("{} imports from {}", module.join("::"), import.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "not in the list of what may be imported:\n{}", wrong.join("\n"));
}

#[test]
fn no_files_import_from_each_other() {
    let mut left = imports();
    // A module without imports from those left is in no cycle.
    loop {
        let done: Vec<_> = left
            .iter()
            .filter(|(_, imports)| imports.is_empty())
            .map(|(done, _)| done.clone())
            .collect();
        if done.is_empty() {
            break;
        }
        left.retain(|module, _| !done.contains(module));
        left.values_mut().for_each(|imports| imports.retain(|import| !done.contains(import)));
    }
    let circles: Vec<_> = left
        .iter()
        .map(|(module, imports)| {
            let imports: Vec<_> = imports.iter().map(|import| import.join("::")).collect();
            format!("{} -> {}", module.join("::"), imports.join(", "))
        })
        .collect();
    assert!(circles.is_empty(), "in a circle, or on the way to one:\n{}", circles.join("\n"));
}
