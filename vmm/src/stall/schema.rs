//! docs/stall.schema.json and what is written are the same: tests only.

use jsonschema::Validator;
use serde_json::Value;

/// Objects of the sample whose fields are taken away one by one.
const OBJECTS: [&str; 17] = [
    "",
    "/host",
    "/config",
    "/config/scenario",
    "/summary/1",
    "/summary/1/modes/3",
    "/summary/1/modes/3/overrun_us",
    "/summary/1/modes/3/over_baseline",
    "/summary/1/modes/3/over_baseline/overrun_p50",
    "/gates/0",
    "/runs/1",
    "/runs/1/overrun_us",
    "/runs/1/stall",
    "/runs/1/stall/causes/0",
    "/runs/1/stall/vcpus/0",
    "/runs/1/stall/tiers",
    "/runs/1/heartbeats/0",
];
/// What need not be there.
const OPTIONAL: [(&str, &str); 2] =
    [("/config/scenario", "baseline"), ("/config/scenario", "resident_limit")];

fn schema() -> Value {
    serde_json::from_str(include_str!("../../../docs/stall.schema.json")).unwrap()
}

fn validator(schema: &Value) -> Validator {
    jsonschema::draft202012::new(schema).unwrap()
}

fn sample() -> Value {
    serde_json::from_str(include_str!("../../../tests/browser/sample.json")).unwrap()
}

fn complaints(validator: &Validator, value: &Value) -> Vec<String> {
    let at = |error: jsonschema::ValidationError<'_>| format!("{}: {error}", error.instance_path());
    validator.iter_errors(value).map(at).collect()
}

/// The same schema, which takes no field that it does not name.
fn closed(schema: &Value) -> Value {
    match schema {
        Value::Object(fields) => {
            let mut fields: serde_json::Map<_, _> =
                fields.iter().map(|(name, value)| (name.clone(), closed(value))).collect();
            if fields.get("properties").is_some_and(Value::is_object)
                && fields.get("type").is_some_and(Value::is_string)
            {
                fields.insert("additionalProperties".into(), false.into());
            }
            Value::Object(fields)
        }
        Value::Array(values) => values.iter().map(closed).collect(),
        other => other.clone(),
    }
}

#[test]
fn the_schema_is_one_and_names_every_field_that_is_written() {
    let schema = schema();
    assert!(jsonschema::draft202012::meta::is_valid(&schema));
    let (_, empty) = super::document::tests::planned(&[]);
    let empty = serde_json::to_value(&empty).unwrap();
    for value in [&sample(), &empty] {
        assert_eq!(complaints(&validator(&schema), value), [""; 0]);
        assert_eq!(complaints(&validator(&closed(&schema)), value), [""; 0]);
    }
    // Fields may be added.
    let mut later = sample();
    later["runs"][0]["colour"] = "blue".into();
    assert!(validator(&schema).is_valid(&later));
    assert!(!validator(&closed(&schema)).is_valid(&later));
}

#[test]
fn a_result_without_a_field_or_with_another_type_is_none() {
    let (schema, sample) = (validator(&schema()), sample());
    for pointer in OBJECTS {
        let fields = sample.pointer(pointer).and_then(Value::as_object);
        let fields = fields.unwrap_or_else(|| panic!("{pointer} is no object"));
        for name in fields.keys() {
            let mut less = sample.clone();
            let object = less.pointer_mut(pointer).and_then(Value::as_object_mut).unwrap();
            object.remove(name);
            let optional = OPTIONAL.contains(&(pointer, name.as_str()));
            assert_eq!(schema.is_valid(&less), optional, "without {pointer}/{name}");
            let mut other = sample.clone();
            other.pointer_mut(pointer).unwrap()[name] = Value::Array(vec![Value::Null]);
            assert!(!schema.is_valid(&other), "another {pointer}/{name}");
        }
    }
    let mut version = sample;
    version["schema"] = "nowait.stall/2".into();
    assert!(!schema.is_valid(&version));
}
