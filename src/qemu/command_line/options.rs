//! QEMU's `key=value,...` options and their JSON form, and sizes in them.

use serde_json::{Map, Value};

/// The value of an option, in the form in which it was given.
#[derive(Debug, Clone, PartialEq)]
pub enum Options {
    /// `first,key=value,flag`; the first may omit its key. Keys may occur more than once.
    Pairs(Vec<(String, Option<String>)>),
    /// A JSON object.
    Json(Map<String, Value>),
}

impl Options {
    /// Read an option whose first value may omit its key, `implied`.
    ///
    /// Never fails: QEMU refuses what it does not understand.
    pub fn read(text: &str, implied: &str) -> Self {
        if text.starts_with('{')
            && let Ok(object) = serde_json::from_str(text)
        {
            return Self::Json(object);
        }
        let mut pairs: Vec<_> = split(text).into_iter().map(|part| pair(&part)).collect();
        if let Some(first) = pairs.first_mut()
            && let (value, None) = first
        {
            *first = (implied.to_owned(), Some(std::mem::take(value)));
        }
        Self::Pairs(pairs)
    }

    /// The keys that are present.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let (pairs, object) = match self {
            Self::Pairs(pairs) => (Some(pairs), None),
            Self::Json(object) => (None, Some(object)),
        };
        let names = pairs.into_iter().flatten().map(|(name, _)| name.as_str());
        names.chain(object.into_iter().flat_map(Map::keys).map(String::as_str))
    }

    /// The last value of `key` as text; a flag without a value is `on`.
    pub fn get(&self, key: &str) -> Option<String> {
        match self {
            Self::Pairs(pairs) => {
                let pair = pairs.iter().rev().find(|(name, _)| name == key);
                pair.map(|(_, value)| value.clone().unwrap_or_else(|| "on".into()))
            }
            Self::Json(object) => match object.get(key)? {
                Value::String(text) => Some(text.clone()),
                Value::Bool(true) => Some("on".into()),
                Value::Bool(false) => Some("off".into()),
                other => Some(other.to_string()),
            },
        }
    }

    /// A switch; `None` if it is absent. Accepts QEMU's old forms `wait` and `nowait`.
    pub fn switch(&self, key: &str) -> Option<bool> {
        if let Self::Pairs(pairs) = self
            && pairs.iter().any(|(name, value)| {
                value.is_none() && name.strip_prefix("no").is_some_and(|name| name == key)
            })
        {
            return Some(false);
        }
        match self.get(key)?.as_str() {
            "on" | "yes" | "true" | "y" => Some(true),
            "off" | "no" | "false" | "n" => Some(false),
            _ => None,
        }
    }

    /// A number of bytes; a bare number counts in units of `unit`.
    pub fn size(&self, key: &str, unit: u64) -> Option<u64> {
        size(&self.get(key)?, unit)
    }

    /// Remove these keys, in any of their forms.
    pub fn without(mut self, keys: &[&str]) -> Self {
        let is_one = |name: &str| {
            keys.iter().any(|key| name == *key || name.strip_prefix("no") == Some(*key))
        };
        match &mut self {
            Self::Pairs(pairs) => pairs.retain(|(name, _)| !is_one(name)),
            Self::Json(object) => object.retain(|name, _| !is_one(name)),
        }
        self
    }

    /// Set `key`, and remove its duplicates.
    pub fn with(self, key: &str, value: Value) -> Self {
        match self {
            // Keep the position: the first pair may give the type.
            Self::Json(mut object) => {
                object.insert(key.to_owned(), value);
                Self::Json(object)
            }
            Self::Pairs(mut pairs) => {
                let text = match &value {
                    Value::String(text) => text.clone(),
                    Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
                    other => other.to_string(),
                };
                match pairs.iter().position(|(name, _)| name == key) {
                    Some(at) => {
                        pairs[at].1 = Some(text);
                        let mut index = 0;
                        pairs.retain(|(name, _)| {
                            index += 1;
                            name != key || index == at + 1
                        });
                    }
                    None => pairs.push((key.to_owned(), Some(text))),
                }
                Self::Pairs(pairs)
            }
        }
    }
}

impl std::fmt::Display for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Json(object) => {
                f.write_str(&serde_json::to_string(object).map_err(|_| std::fmt::Error)?)
            }
            Self::Pairs(pairs) => {
                for (index, (name, value)) in pairs.iter().enumerate() {
                    let comma = if index > 0 { "," } else { "" };
                    match value {
                        Some(value) => write!(f, "{comma}{name}={}", value.replace(',', ",,"))?,
                        None => write!(f, "{comma}{name}")?,
                    }
                }
                Ok(())
            }
        }
    }
}

/// Split at single commas; a double one is a literal comma.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match (character, parts.last_mut()) {
            (',', Some(part)) if characters.peek() == Some(&',') => {
                characters.next();
                part.push(',');
            }
            (',', _) => parts.push(String::new()),
            (_, Some(part)) => part.push(character),
            (_, None) => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn pair(part: &str) -> (String, Option<String>) {
    match part.split_once('=') {
        Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
        None => (part.to_owned(), None),
    }
}

/// Parse a number of bytes as QEMU does: `512M`, `1.5G`, `0x1000`; a bare one counts in `unit`.
pub fn size(text: &str, unit: u64) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok()?.checked_mul(unit);
    }
    let last = text.chars().last()?;
    let (number, unit) = match last.to_ascii_uppercase() {
        'B' => (&text[..text.len() - 1], 1),
        'K' => (&text[..text.len() - 1], 1 << 10),
        'M' => (&text[..text.len() - 1], 1 << 20),
        'G' => (&text[..text.len() - 1], 1 << 30),
        'T' => (&text[..text.len() - 1], 1 << 40),
        'P' => (&text[..text.len() - 1], 1 << 50),
        _ => (text, unit),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit);
    }
    let bytes = number.parse::<f64>().ok()? * unit as f64;
    (bytes.is_finite() && bytes >= 0.0 && bytes < u64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn both_forms_are_read_changed_and_written() {
        let pairs = Options::read("memory-backend-ram,id=a,size=1G,share", "qom-type");
        assert_eq!(pairs.get("qom-type").as_deref(), Some("memory-backend-ram"));
        assert_eq!(pairs.size("size", 1), Some(1 << 30));
        assert_eq!(pairs.switch("share"), Some(true));
        let changed =
            pairs.with("qom-type", json!("memory-backend-file")).with("share", json!(false));
        assert_eq!(changed.to_string(), "qom-type=memory-backend-file,id=a,size=1G,share=off");
        let text = r#"{"qom-type":"memory-backend-ram","id":"a","size":1073741824}"#;
        let object = Options::read(text, "qom-type");
        assert_eq!(object.size("size", 1), Some(1 << 30));
        assert_eq!(object.to_string(), text);
    }

    #[test]
    fn commas_and_old_switches_are_qemus() {
        let options = Options::read("socket,id=m,path=/a,,b,server,nowait", "backend");
        assert_eq!(options.get("path").as_deref(), Some("/a,b"));
        assert_eq!(options.switch("server"), Some(true));
        assert_eq!(options.switch("wait"), Some(false));
        assert_eq!(options.switch("reconnect"), None);
        let without = options.without(&["server", "wait"]);
        assert_eq!(without.to_string(), "backend=socket,id=m,path=/a,,b");
    }

    #[test]
    fn sizes_are_qemus() {
        assert_eq!(size("512", 1 << 20), Some(512 << 20));
        assert_eq!(size("1.5G", 1), Some(3 << 29));
        assert_eq!(size("0x10", 1), Some(16));
        for wrong in ["", "x", "1Q", "-1", "99999999999P", "NaN"] {
            assert_eq!(size(wrong, 1 << 20), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_was_read(text in "[a-z=,{}\":.0-9]{0,40}") {
            let options = Options::read(&text, "first");
            // Text that is not a JSON object may become one: `{}=`.
            if let Options::Pairs(pairs) = &options
                && pairs.iter().all(|(name, _)| !name.is_empty() && !name.contains(','))
                && !options.to_string().starts_with('{')
            {
                prop_assert_eq!(&Options::read(&options.to_string(), "first"), &options);
            }
        }
    }
}
